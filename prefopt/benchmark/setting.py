"""What the benchmarks share: the shape of the model, the options of a run, trainers made alike, quiet."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from prefopt.config import PreferenceConfig, has_accelerator
from prefopt.data.dataset import TokenDataset
from prefopt.losses import Loss, Objective
from prefopt.trainer import PreferenceTrainer

MAX_LENGTH = 1024
PRECISIONS = ("float32", "bfloat16")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights. The default has 8.4 million parameters."""

    layers: int = 5
    width: int = 256
    intermediate: int = 752
    heads: int = 4
    vocabulary: int = 8192

    def model(self) -> LlamaForCausalLM:
        """The same weights every time, in float32."""
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                max_position_embeddings=2 * MAX_LENGTH,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
            )
        )


SMALL = Shape(layers=2, width=32, intermediate=64, vocabulary=512)


@dataclass(frozen=True)
class Options:
    """What the command line says. `quick` asks for the form of the answer in seconds, not for figures."""

    output: Path
    rounds: int = 7
    steps: int = 4
    batch_size: int = 8
    threads: int = 1
    seed: int = 0
    quick: bool = False
    data: Path = Path("../shared/data")

    @property
    def shape(self) -> Shape:
        return SMALL if self.quick else Shape()

    def about(self) -> dict[str, Any]:
        """Settings, machine and versions, for the record."""
        settings = ("rounds", "steps", "batch_size", "threads", "seed", "quick")
        packages = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
        return {
            **{name: getattr(self, name) for name in settings},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        }


def device() -> torch.device:
    """Where the benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens: the rows are token ids already."""
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    core = Tokenizer(models.WordLevel(special, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def settings(options: Options, folder: Path, *, precision: str = "float32", **changes: Any) -> dict[str, Any]:
    """Training settings that both trainers take: the rows in their order, nothing saved, nothing reported."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": options.batch_size,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": options.rounds + 1,  # every round reads all rows; one more is the warm-up
        "max_length": MAX_LENGTH,
        "bf16": precision == "bfloat16",
        "use_cpu": not has_accelerator(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


def our_trainer(
    rows: Rows,
    shape: Shape,
    given: Mapping[str, Any],
    loss: str | Loss | Objective = "dpo",
    *,
    adapter: PeftConfig | None = None,
    source: str = "cached",
    **changes: Any,
) -> PreferenceTrainer:
    """prefopt's trainer on token rows, activations kept, the reference cached unless told otherwise."""
    block = {"source": source, "store": str(Path(given["output_dir"]) / "reference")}
    reference = None if Objective.of(loss).reference == "none" else block
    ours = {"activation_checkpointing": False, "reference": reference, **given, **changes}
    return PreferenceTrainer(
        shape.model(),
        args=PreferenceConfig(**ours),
        loss=loss,
        train_dataset=TokenDataset([_as_arrays(row) for row in rows]),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def trl_trainer(rows: Rows, shape: Shape, given: Mapping[str, Any]) -> Trainer:
    """TRL's DPO trainer on the same rows, activations kept, reference scores precomputed."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenRows(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # its columns are already what tokenization makes

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return TokenRows(
        shape.model(),
        args=DPOConfig(gradient_checkpointing=False, precompute_ref_log_probs=True, **given),
        train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
        processing_class=tokenizer(),
    )


def _as_arrays(row: Mapping[str, Any]) -> dict[str, Any]:
    """A token row as tokenization leaves it."""
    ids = {name: np.array(value, dtype=np.int32) for name, value in row.items() if name.endswith("_ids")}
    scored = {name: np.array(value, dtype=bool) for name, value in row.items() if name.endswith("_scored")}
    return {**row, **ids, **scored}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines and bars of the trainers under measurement."""
    import datasets
    from transformers.utils import logging

    bars, verbosity = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with patch.dict(os.environ, TQDM_DISABLE="1"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
