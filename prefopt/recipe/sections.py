"""The sections of a recipe as frozen dataclasses: every field with its type, default, help, and range or choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from prefopt.data.spec import DataSpec
from prefopt.ranges import COUNT, POSITIVE, SHARE, Range
from prefopt.settings import REFERENCE_FORMS, REFERENCE_SOURCES


def about(explain: str, *, choices: tuple[str, ...] = (), within: Range | None = None) -> dict[str, Any]:
    """What a field means and may hold, kept in its metadata."""
    return {"help": explain, "choices": choices, "range": within}


@dataclass(frozen=True)
class ModelSection:
    """The policy, its tokenizer and its adapter. Names are those of TRL's `ModelConfig`."""

    model_name_or_path: str | None = field(
        default=None, metadata=about("The model to start from: a Hub name or a local folder.")
    )
    model_revision: str | None = field(default=None, metadata=about("Branch, tag or commit of the model on the Hub."))
    from_scratch: dict[str, Any] | None = field(
        default=None,
        metadata=about(
            "Instead of model_name_or_path: model_type and fields of its configuration; starts with random weights."
        ),
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata=about("The tokenizer, where it is not the model's own.")
    )
    chat_template_path: str | None = field(default=None, metadata=about("A file with the chat template."))
    dtype: str = field(
        default="float32",
        metadata=about("Precision the weights are loaded in.", choices=("auto", "bfloat16", "float16", "float32")),
    )
    attn_implementation: str | None = field(
        default=None, metadata=about("Attention kernel: sdpa, eager, flash_attention_2, ...")
    )
    trust_remote_code: bool = field(default=False, metadata=about("Run Python code that comes with the model."))
    use_peft: bool = field(default=False, metadata=about("Train a LoRA adapter instead of all weights."))
    lora_r: int = field(default=16, metadata=about("Rank of the adapter.", within=COUNT))
    lora_alpha: int = field(default=32, metadata=about("Scale of the adapter.", within=COUNT))
    lora_dropout: float = field(
        default=0.05, metadata=about("Dropout inside the adapter.", within=Range(0, 1, below_high=True))
    )
    lora_target_modules: str | list[str] | None = field(
        default=None, metadata=about("Modules that get an adapter; `all-linear` for every linear one.")
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=about("Modules trained in full beside the adapter.")
    )
    use_rslora: bool = field(default=False, metadata=about("Scale the adapter by lora_alpha / sqrt(lora_r)."))
    use_dora: bool = field(
        default=False, metadata=about("Split updates into direction and length (DoRA, arXiv 2402.09353).")
    )
    load_in_8bit: bool = field(default=False, metadata=about("Hold the frozen weights in 8 bits; needs use_peft."))
    load_in_4bit: bool = field(default=False, metadata=about("Hold the frozen weights in 4 bits; needs use_peft."))


@dataclass(frozen=True)
class DatasetEntry:
    """One part of a mixture of datasets."""

    path: str | None = field(default=None, metadata=about("A Hub dataset or a local folder."))
    name: str | None = field(default=None, metadata=about("Configuration of a Hub dataset."))
    data_files: str | list[str] | None = field(
        default=None, metadata=about("Files to read, instead of a path or inside it.")
    )
    split: str = field(default="train", metadata=about("Split to train on."))
    test_split: str | None = field(default=None, metadata=about("Split to evaluate on."))
    columns: list[str] | None = field(default=None, metadata=about("Columns to keep; all when not set."))
    column_names: dict[str, str] | None = field(
        default=None, metadata=about("Our column name: the name it has in this part.")
    )
    fraction: float = field(
        default=1.0, metadata=about("Share of the rows to use.", within=Range(0, 1, above_low=True))
    )

    def spec(self, *, with_test: bool) -> DataSpec:
        """What the data room loads for this part."""
        return DataSpec(
            path=self.path,
            name=self.name,
            data_files=self.data_files,
            split=self.split,
            test_split=self.test_split if with_test else None,
            columns=self.columns,
            column_names=self.column_names or {},
            fraction=self.fraction if self.fraction < 1 else None,
        )


@dataclass(frozen=True)
class DataSection:
    """Where the rows come from: `dataset_name`, `data_files` (alone, or inside it), or `datasets`, a mixture."""

    dataset_name: str | None = field(default=None, metadata=about("A Hub dataset or a local folder."))
    dataset_config: str | None = field(default=None, metadata=about("Configuration of the Hub dataset."))
    dataset_train_split: str = field(default="train", metadata=about("Split to train on."))
    dataset_test_split: str = field(default="test", metadata=about("Split to evaluate on."))
    data_files: str | list[str] | dict[str, Any] | None = field(
        default=None,
        metadata=about("JSON-lines, JSON, CSV or Parquet files: one, a list, or a block with train and test."),
    )
    datasets: tuple[DatasetEntry, ...] = field(
        default=(), metadata=about("A mixture: a list of {path, data_files, split, fraction, ...}.")
    )
    targets: tuple[DatasetEntry, ...] = field(
        default=(),
        metadata=about(
            "Rows of prompt and completion for a loss with a target (slic), one beside each pair: a list like datasets."
        ),
    )
    column_names: dict[str, str] | None = field(
        default=None, metadata=about("Our column name: the name it has in the data.")
    )
    test_split_size: float | None = field(
        default=None,
        metadata=about(
            "Share or number of the training rows held back for evaluation.", within=Range(0, above_low=True)
        ),
    )

    @property
    def has_test_rows(self) -> bool:
        """Whether the section itself says where evaluation rows come from, beyond the default split of a dataset."""
        in_files = isinstance(self.data_files, dict) and "test" in self.data_files
        return in_files or self.test_split_size is not None or any(entry.test_split for entry in self.datasets)

    def spec(self, *, evaluate: bool) -> DataSpec:
        """What the data room loads. `evaluate`: also the test split that a dataset has by default."""
        size = self.test_split_size
        test_split = "test" if isinstance(self.data_files, dict) and "test" in self.data_files else None
        if self.dataset_name and evaluate and size is None:
            test_split = self.dataset_test_split
        return DataSpec(
            path=self.dataset_name,
            name=self.dataset_config,
            data_files=self.data_files,
            mixture=tuple(entry.spec(with_test=evaluate) for entry in self.datasets),
            split=self.dataset_train_split,
            test_split=test_split,
            test_split_size=int(size) if size is not None and size >= 1 else size,
            column_names=self.column_names or {},
            targets=DataSpec(mixture=tuple(entry.spec(with_test=False) for entry in self.targets))
            if self.targets
            else None,
        )

    def local_files(self) -> list[Path]:
        """The files on this machine that the rows come from, patterns and folders opened up, sorted."""
        parts = [part for entry in (*self.datasets, *self.targets) for part in (entry.path, entry.data_files)]
        named = [self.dataset_name, self.data_files, *parts]
        return sorted({path for names in named for path in _files(names)})


@dataclass(frozen=True)
class ReferenceSection:
    """The model a loss compares with: the starting model when `model` is None, frozen while `sync_steps` is None."""

    source: str = field(
        default="auto",
        metadata=about(
            "cached: every answer is scored once, before training, and found again by later runs. live: scored "
            "beside the policy, step by step. auto: cached, unless that is more work or there is no room for it. "
            "none: there is none.",
            choices=REFERENCE_SOURCES,
        ),
    )
    form: str = field(
        default="auto",
        metadata=about(
            "What is kept for a loss that compares whole distributions. hidden: final hidden states, with a copy of "
            "the head. expected: mean rows of the head, exact while the policy's head is frozen; the vocabulary is "
            "then read once, as for DPO. auto: expected where it is exact.",
            choices=REFERENCE_FORMS,
        ),
    )
    model: str | None = field(default=None, metadata=about("A Hub name or a local folder."))
    revision: str | None = field(default=None, metadata=about("Branch, tag or commit of that model."))
    store: str | None = field(
        default=None,
        metadata=about("Folder of the store; $PREFOPT_STORE or one in the user's cache when not set."),
    )
    max_gb: float | None = field(
        default=None,
        metadata=about("Most gigabytes the store may hold; the disk alone decides when not set.", within=POSITIVE),
    )
    batch_size: int | None = field(
        default=None,
        metadata=about(
            "Answers the reference scores at once; eight for each row of a batch when not set.", within=COUNT
        ),
    )
    sync_steps: int | None = field(
        default=None,
        metadata=about(
            "TR-DPO: after every so many optimizer steps the reference follows the policy. It is then live, and part "
            "of every checkpoint. Not set: it never moves.",
            within=COUNT,
        ),
    )
    mixup_alpha: float | None = field(
        default=None,
        metadata=about(
            "How far it follows: reference <- alpha policy + (1 - alpha) reference, weight by weight; 1 is a copy. 0.6 "
            "when not set. Of an adapter its own weights are averaged, not the products that they add to the base.",
            within=SHARE,
        ),
    )


@dataclass(frozen=True)
class LossSpec:
    """A loss by its registered name, with the knobs that were written; the others keep the loss's own defaults."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)


def _files(names: Any) -> list[Path]:
    """Local files of one name, a list or a block of names; what is not on this machine is left out."""
    if isinstance(names, dict):
        names = list(names.values())
    if isinstance(names, (list, tuple)):
        return [path for name in names for path in _files(name)]
    found = [Path(match) for match in glob(names, recursive=True)] if names else []
    return [path for match in found for path in (match.rglob("*") if match.is_dir() else [match]) if path.is_file()]
