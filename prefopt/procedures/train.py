"""One training stage from its recipe: data, then model, then trainer, then the run folder's report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from prefopt.checks import check_rows
from prefopt.config import PreferenceConfig
from prefopt.console import say
from prefopt.data import Example, load_train_test
from prefopt.data.dataset import TokenDataset
from prefopt.errors import UserError
from prefopt.losses import Objective
from prefopt.losses.trial import try_losses
from prefopt.models import load_model, load_tokenizer, new_adapter, quantization_config
from prefopt.procedures.inputs import keep_plugins
from prefopt.procedures.lineage import Lineage
from prefopt.recipe import ModelSection, Recipe, ReferenceSection
from prefopt.report.card import write_card
from prefopt.report.plots import save_plots
from prefopt.report.progress import LastStep, show_progress
from prefopt.report.results import METRICS_FILE, MetricsFile, read_metrics, write_results
from prefopt.resuming import AUTO, NEVER, checkpoint_to_resume
from prefopt.scratch import build_model, train_tokenizer
from prefopt.token_cache import preparation
from prefopt.trainer import PreferenceTrainer

BAD_ROWS = ("on_bad_row", "max_bad_rows")


@dataclass
class Phases:
    """Wall-clock seconds of each phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block and add it to the phase of this name."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)


def train(recipe: Recipe, lineage: Lineage | None = None) -> dict[str, Any]:
    """Train as a recipe says and leave model, recipe, figures, plots and card in its run folder; returns the results.

    Goes on from a checkpoint as `resume` says. `lineage` proves where the model comes from. Raises `UserError`
    for what a user can mend, data before weights.
    """
    phases = Phases()
    objective = recipe.objective()
    try_losses(objective.losses)
    args = recipe.training_arguments()
    if lineage is not None:
        lineage.check_files()
    with phases.phase("data"):
        tokenizer = open_tokenizer(recipe)
        data, test = preparation(tokenizer, args, objective).train_and_test(recipe.data_spec())
        data = check_rows(objective, data)
        test = check_rows(objective, test, like=data)
    with phases.phase("model"):
        trainer = build_trainer(recipe, objective, tokenizer, data, test)
        trainer.recipe = recipe.resolved()
        if lineage is not None:
            lineage.begin(trainer)
    if PartialState().is_main_process:
        recipe.dump(Path(recipe.output_dir) / "recipe.yaml")
        keep_plugins(recipe)
    say(*opening_lines(trainer))
    with phases.phase("train"):
        outcome = trainer.train(resume_from_checkpoint=_resume(args))
    with phases.phase("evaluate"):
        evaluation = _closing_evaluation(trainer) if test is not None else {}
    with phases.phase("save"):
        trainer.save_model(recipe.output_dir, _internal_call=True)  # the push comes when the report is written
        if lineage is not None:
            lineage.finish(trainer)
    results = {
        "train": {**_last_logged(trainer), **outcome.metrics},
        "eval": evaluation,
        "data": {"train": data.reports["tokens"], **({"eval": test.reports["tokens"]} if test else {})},
        "rows": {"train": data.reports["data"], **({"eval": test.reports["data"]} if test else {})},
        "fingerprint": {"train": data.fingerprint, **({"eval": test.fingerprint} if test else {})},
        "reference": trainer.reference.summary,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": phases.seconds,
    }
    if PartialState().is_main_process:
        write_report(recipe, objective, results)
        if args.push_to_hub:
            trainer.push_run()
    PartialState().wait_for_everyone()
    return results


def build_trainer(
    recipe: Recipe,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenDataset,
    test: TokenDataset | None,
) -> PreferenceTrainer:
    """The trainer of a recipe: model, adapter and reference opened, nothing trained yet."""
    section, reference = recipe.model, recipe.reference
    args = recipe.training_arguments()
    model = open_policy(recipe, tokenizer)
    _check_positions(model, data)
    explicit = None
    if reference.model is not None:
        _check_reference_tokens(reference, tokenizer)
        explicit = load_model(reference.model, dtype=section.dtype, revision=reference.revision, **_options(section))
    trainer = PreferenceTrainer(
        model,
        explicit,
        args,
        objective.losses,  # their weights are in the arguments
        train_dataset=data,
        eval_dataset=test,
        processing_class=tokenizer,
        callbacks=[MetricsFile(), LastStep()],
        peft_config=new_adapter(section, model),
    )
    show_progress(trainer)
    return trainer


def open_policy(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model that a recipe starts from, made or loaded; with its adapter where the recipe names one."""
    section = recipe.model
    if section.from_scratch is not None:
        seed, attention = recipe.training_arguments().seed, section.attn_implementation
        model = build_model(section.from_scratch, tokenizer, seed, attn_implementation=attention)
        return model.to(getattr(torch, "float32" if section.dtype == "auto" else section.dtype))
    name = str(section.model_name_or_path)
    return load_model(name, dtype=section.dtype, revision=section.model_revision, **_options(section))


def _options(section: ModelSection) -> dict[str, Any]:
    return {
        "trust_remote_code": section.trust_remote_code,
        "attn_implementation": section.attn_implementation,
        "quantization_config": quantization_config(section),
    }


def open_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: loaded, or trained on the training rows for a model from scratch."""
    section = recipe.model
    tokenizer = _scratch_tokenizer(recipe)
    name = section.tokenizer_name_or_path or section.model_name_or_path
    if tokenizer is None:
        revision = section.model_revision if section.tokenizer_name_or_path is None else None
        tokenizer = load_tokenizer(str(name), revision=revision, trust_remote_code=section.trust_remote_code)
    if section.chat_template_path is not None:
        tokenizer.chat_template = _read_template(Path(section.chat_template_path))
    return tokenizer


def opening_lines(trainer: PreferenceTrainer) -> list[str]:
    """What is about to be trained, in a few lines."""
    args = trainer.args
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    losses = " + ".join(f"{weight:g} {loss}" for weight, loss in trainer.objective.terms)
    return [
        f"loss: {losses}",
        f"model: {type(trainer.model).__name__}, {trainable:,} of {total:,} parameters trained",
        f"step: {batch} rows ({args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} "
        f"micro-batches x {args.world_size} processes), {args.train_sampling_strategy} order",
        f"dropout: {'off (adapters keep their own)' if args.disable_dropout else 'as the model has it'}",
    ]


def write_report(recipe: Recipe, objective: Objective, results: dict[str, Any]) -> None:
    """Leave `results.json`, `plots/` and the model card in the run folder."""
    folder = Path(recipe.output_dir)
    write_results(folder, results)
    plots = save_plots(folder, read_metrics(folder / METRICS_FILE))
    docs = {loss.name: type(loss).__doc__ or "" for loss in objective.losses}
    write_card(folder, recipe.resolved(), base_model=recipe.model.model_name_or_path, loss_docs=docs)
    say(f"report: {folder}/README.md, results.json, metrics.jsonl" + (", plots/" if plots else ""))


def _scratch_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """A tokenizer trained on the training rows, for a model from scratch; None where the recipe names one."""
    section = recipe.model
    if section.from_scratch is None or section.tokenizer_name_or_path is not None:
        return None
    rules = {setting: recipe.training[setting] for setting in BAD_ROWS if setting in recipe.training}
    unlabelled = not recipe.objective().all_completions
    examples = load_train_test(recipe.data_spec(), unlabelled=unlabelled, **rules)[0].examples
    chat = any(isinstance(example.prompt, list) for example in examples)
    return train_tokenizer(_texts(examples), section.from_scratch.get("vocab_size", 8192), chat=chat)


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template_path: {file} cannot be read: {error}. Name a text file.") from error


def _check_positions(model: Any, data: TokenDataset) -> None:
    """Refuse rows that reach beyond the model's positions: it fails on them, or reads what it never learnt to."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(data.widths(shared=False))
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: the longest row has {longest} tokens, and the model has {positions} positions. "
            f"Write max_length: {positions}."
        )


def _check_reference_tokens(reference: ReferenceSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference that reads other ids: its scores of the policy's tokens would mean nothing."""
    try:
        other = load_tokenizer(str(reference.model), revision=reference.revision)
    except UserError:
        return  # weights alone, or a name that is refused when they are loaded
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"reference.model: the tokenizer of `{reference.model}` is another than the policy's, so their "
            "probabilities cannot be compared token by token. Use a reference of the same family."
        )


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    """Every text of the examples, message by message."""
    for example in examples:
        for part in (example.prompt, example.chosen, example.rejected, example.completion):
            if isinstance(part, str):
                yield part
            yield from (message["content"] or "" for message in part or [] if isinstance(message, dict))


def _resume(args: PreferenceConfig) -> str:
    """Where the run goes on from; a checkpoint of another folder only until this one has checkpoints of its own."""
    named, output_dir = args.resume, Path(str(args.output_dir))
    if named in (AUTO, NEVER) or Path(named).resolve().is_relative_to(output_dir.resolve()):
        return named
    return str(checkpoint_to_resume(AUTO, str(output_dir)) or named)


def _closing_evaluation(trainer: PreferenceTrainer) -> dict[str, float]:
    """The figures of the weights that are saved; the schedule may have made them at the very last step."""
    if trainer.args.load_best_model_at_end:
        # The log would have them at the last step, whose weights are others.
        trainer.remove_callback(MetricsFile)
        return trainer.evaluate()
    last = next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), {})
    return last if last.get("step") == trainer.state.global_step else trainer.evaluate()


def _last_logged(trainer: PreferenceTrainer) -> dict[str, float]:
    """The last training metrics that were logged."""
    return next((line for line in reversed(trainer.state.log_history) if "loss" in line), {})
