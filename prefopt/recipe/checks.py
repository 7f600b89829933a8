"""What must fit together in a recipe. A setting that would have no effect is refused like one that is wrong."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefopt.errors import RecipeError, nearest
from prefopt.losses import Objective, make
from prefopt.recipe.problems import Problems
from prefopt.recipe.read import Draft
from prefopt.recipe.sections import DataSection, LossSpec
from prefopt.settings import selection_conflict, sync_conflict

ADAPTER = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
    "load_in_8bit", "load_in_4bit",
)  # fmt: skip
HUB_DATA = ("dataset_config", "dataset_train_split", "dataset_test_split")


def check(draft: Draft, problems: Problems) -> None:
    """Add to `problems` whatever is missing, contradicts itself, or has no effect."""
    complete = not problems
    _check_model(draft, problems)
    _check_data(draft, problems)
    _check_losses(draft, problems)
    if complete:
        _check_missing(draft, problems)
        _check_reference(draft, problems)


def build_objective(losses: list[LossSpec] | tuple[LossSpec, ...], weights: list[float] | None) -> Objective:
    """The objective of these losses, each with weight 1 unless given. Raises `RecipeError`."""
    made = [make(loss.name, **loss.knobs) for loss in losses]
    return Objective(list(zip(weights or [1.0] * len(made), made, strict=True)))


def scratch_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The model configuration of a `from_scratch` block. Raises `RecipeError`; fields nobody reads are refused."""
    settings = dict(fields)
    model_type = settings.pop("model_type", None)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type is None:
        raise RecipeError("`model_type` is missing. Write for instance model_type: llama.")
    if model_type not in known:
        raise RecipeError(f"there is no causal language model of type `{model_type}`.{nearest(str(model_type), known)}")
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    readable = {*config_class().to_dict(), *config_class.attribute_map}
    for name in settings:
        if name not in readable:
            raise RecipeError(f"`{model_type}` has no field `{name}`.{nearest(name, readable)}")
    try:
        return config_class(**settings)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"transformers refuses these fields: {' '.join(str(error).split())}") from error


def _check_missing(draft: Draft, problems: Problems) -> None:
    if not (draft.model.get("model_name_or_path") or draft.model.get("from_scratch")):
        place = draft.place("model_name_or_path")
        problems.add(place, "model_name_or_path", "is missing. Write the model to start from.")
    # Only the plain procedure needs data named here; others may make their own.
    plain = draft.procedure.get("name", "single") == "single"
    if plain and not any(draft.data.get(name) for name in ("dataset_name", "data_files", "datasets")):
        place = draft.place("dataset_name")
        problems.add(place, "dataset_name", "is missing. Write dataset_name, or data_files: [pairs.jsonl].")
    if not draft.losses:
        problems.add(draft.place("loss"), "loss", "is missing. Write for instance loss: {name: dpo}.")


def _check_model(draft: Draft, problems: Problems) -> None:
    model = draft.model
    scratch = model.get("from_scratch")
    if scratch is not None:
        for name in ("model_name_or_path", "model_revision", "load_in_8bit", "load_in_4bit"):
            if model.get(name):
                problems.add(draft.place(name), name, "contradicts from_scratch. Keep one of the two.")
        if (
            model.get("use_peft")
            and draft.procedure.get("name", "single") == "single"
            and "start" not in draft.procedure
        ):
            reason = "an adapter alone would be kept, without the random weights it belongs to. Write procedure.start."
            problems.add(draft.place("use_peft"), "use_peft", reason)
        try:
            scratch_config(scratch)
        except RecipeError as error:
            problems.add(draft.place("from_scratch"), "from_scratch", str(error))
    if not model.get("use_peft"):
        for name in ADAPTER:
            if model.get(name):
                problems.add(draft.place(name), name, "has no effect without an adapter. Write use_peft: true.")
    if model.get("load_in_8bit") and model.get("load_in_4bit"):
        problems.add(draft.place("load_in_8bit"), "load_in_8bit", "contradicts load_in_4bit. Keep one of the two.")


def _check_data(draft: Draft, problems: Problems) -> None:
    data = draft.data
    sources = [name for name in ("dataset_name", "data_files", "datasets") if data.get(name)]
    if "datasets" in sources:
        for name in ("dataset_name", "data_files", "column_names"):
            if data.get(name):
                problems.add(draft.place(name), name, "contradicts datasets. Write it in an entry of the mixture.")
    if sources and "dataset_name" not in sources:
        for name in HUB_DATA:
            if name in data:
                problems.add(draft.place(name), name, "has no effect without dataset_name. Remove it.")
    _check_files(draft, problems)
    _check_sizes(draft, problems)
    wants_evaluation = draft.training.get("eval_strategy", "no") != "no"
    if wants_evaluation and sources and "dataset_name" not in sources and not DataSection(**data).has_test_rows:
        reason = "there are no rows to evaluate on. Write test_split_size: 0.1, or data_files: {train: ..., test: ...}."
        problems.add(draft.place("eval_strategy"), "eval_strategy", reason)


def _check_files(draft: Draft, problems: Problems) -> None:
    files = draft.data.get("data_files")
    if not isinstance(files, dict):
        return
    place = draft.place("data_files")
    for name in files:
        if name not in ("train", "test"):
            problems.add(place, f"data_files.{name}", "a block of files has train and test, and nothing else.")
    if not files.get("train"):
        problems.add(place, "data_files", "`train` is missing. Write train: [pairs.jsonl].")
    if files.get("test") and draft.data.get("test_split_size"):
        place = draft.place("test_split_size")
        problems.add(place, "test_split_size", "contradicts the test files of data_files. Keep one of the two.")


def _check_sizes(draft: Draft, problems: Problems) -> None:
    size = draft.data.get("test_split_size")
    if size is not None and size >= 1 and size != int(size):
        reason = f"must be a share below 1 or a whole number of rows, not {size}."
        problems.add(draft.place("test_split_size"), "test_split_size", reason)
    if draft.training.get("max_bad_rows") is not None and draft.training.get("on_bad_row") != "skip":
        reason = "has no effect while bad rows stop the run. Write on_bad_row: skip."
        problems.add(draft.place("max_bad_rows"), "max_bad_rows", reason)


def _check_losses(draft: Draft, problems: Problems) -> None:
    weights = draft.loss_weights
    if weights is not None and draft.losses and len(weights) != len(draft.losses):
        reason = f"has {len(weights)} numbers, but there are {len(draft.losses)} losses. Write one for each."
        problems.add(draft.place("loss_weights"), "loss_weights", reason)


def _check_reference(draft: Draft, problems: Problems) -> None:
    """Only for a recipe whose losses are whole: what they need decides whether there is a reference."""
    if problems or not draft.losses:
        return
    try:
        need = build_objective(draft.losses, draft.loss_weights).reference
    except RecipeError as error:
        problems.add(draft.place("loss"), "loss", str(error).removeprefix("loss: "))
        return
    names = ", ".join(loss.name for loss in draft.losses)
    place, reference = draft.place("reference"), draft.reference
    if reference is None:
        return
    if need == "none":
        problems.add(place, "reference", f"{names} needs no reference, so this has no effect. Remove the block.")
    elif reference.get("source") == "none":
        problems.add(place, "reference.source", f"{names} needs a reference. Write source: auto.")
    if reference.get("form") and need == "logp":
        problems.add(place, "reference.form", f"has no effect: {names} compares no whole distributions. Remove it.")
    elif reference.get("form") and reference.get("source") == "live":
        problems.add(place, "reference.form", "has no effect with source: live. Remove one of them.")
    if conflict := sync_conflict(reference):
        problems.add(place, f"reference.{conflict[0]}", conflict[1])
    if reason := selection_conflict(reference, draft.training):
        problems.add(place, "reference.sync_steps", reason)
    if reference.get("revision") and not reference.get("model"):
        problems.add(place, "reference.revision", "has no effect without reference.model. Remove it.")
