"""The answers of a procedure with rounds, on disk: the data's own, and what each round's model says."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from prefopt.console import say
from prefopt.data.formats import Example
from prefopt.data.sources import load_train_test
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import UserError
from prefopt.evaluation import evaluate_model
from prefopt.generation import Sampling, generate_to_disk
from prefopt.models import load_model, quantization_config
from prefopt.procedures.pairing import (
    FIGURES,
    SUPERVISED,
    TEST,
    TRAIN,
    answer_row,
    prompt_row,
    read_data,
    write_figures,
    write_rows,
)
from prefopt.procedures.rounds import HELD_OUT, LENGTHS, OWN, RoundSettings, model_folder, round_folder
from prefopt.procedures.sampler import opened_vllm
from prefopt.procedures.train import BAD_ROWS, open_tokenizer
from prefopt.ranks import on_main
from prefopt.recipe import Recipe
from prefopt.reference.record import recorded_weights
from prefopt.report.plots import BLUE, GREEN, GREY, ORANGE, Curve, Panel
from prefopt.report.results import RESULTS_FILE, write_whole
from prefopt.report.rounds import write_rounds

TRAINED = ("loss", "rewards/accuracies", "rewards/margins")
COLUMNS = {
    "held_out/real_logp_per_token": "held-out logp/token",
    "held_out/score": "score",
    "own/score": "score, train",
    "held_out/unfinished": "cut off",
    "held_out/tokens": "tokens",
    "held_out/real_tokens": "tokens, data",
    "own/unfinished": "cut off, train",
    "own/tokens": "tokens, train",
    "train/pairs": "pairs",
    "train/loss": "loss",
    "train/rewards/accuracies": "accuracy",
}
PANELS = (
    Panel(
        "likelihood",
        "Likelihood of the data's own answers",
        "log-probability per token (nats)",
        (
            Curve("held_out/real_logp_per_token", "held out", BLUE, noisy=False),
            Curve("own/real_logp_per_token", "trained on", GREY, noisy=False),
        ),
    ),
    Panel(
        "score",
        "The judge's score",
        "mean over answers",
        (
            Curve("held_out/score", "held-out prompts", BLUE, noisy=False),
            Curve("own/score", "training prompts", GREY, noisy=False),
        ),
    ),
    Panel(
        "unfinished",
        "Answers cut off at max_new_tokens",
        "share of answers",
        (
            Curve("held_out/unfinished", "held-out prompts", BLUE, noisy=False),
            Curve("own/unfinished", "training prompts", GREY, noisy=False),
        ),
        limits=(-0.03, 1.03),
    ),
    Panel(
        "length",
        "Length of answers",
        "tokens",
        (
            Curve("held_out/tokens", "the model's, held-out prompts", BLUE, noisy=False),
            Curve("own/tokens", "the model's, training prompts", GREY, noisy=False),
            Curve("held_out/real_tokens", "the data's, held out", ORANGE, noisy=False),
        ),
    ),
)
MEASURED = "Measured alone, and nothing trained on it: the columns after `round`, means over held-out answers. "
NOTE = (
    "Each row is the model that a round starts from, the last one the model that is left: the likelihood of the "
    "data's own answers to held-out prompts, or the judge's mean score; the share of sampled answers that reached the "
    "limit of new tokens; mean lengths; and the last figures of the training that made the model."
)


def write_data(recipe: Recipe, folder: Path, settings: RoundSettings, *, answers: bool) -> dict[str, int]:
    """Write prompts of a recipe's data to `train.jsonl` and, where it has held-out rows, `test.jsonl`; for a supervised
    start also every row, to `supervised.jsonl`.

    `answers`: with the data's own answers, which every row must then have. At most `settings.prompts` and
    `settings.eval_prompts` rows, drawn with the recipe's seed; returns how many.
    Raises `DataError` as every loader of rows does.
    """
    rules = {name: recipe.training[name] for name in BAD_ROWS if name in recipe.training}
    train, test = load_train_test(recipe.data_spec(), supervised=answers, prompts_only=not answers, **rules)
    say(*(f"data: {line}" for line in train.report.lines()))
    parts = {TRAIN: drawn(train.examples, settings.prompts, seed_of(recipe))}
    if answers and "start" in recipe.procedure:
        parts[SUPERVISED] = train.examples
    if test is not None:
        parts[TEST] = drawn(test.examples, settings.eval_prompts, seed_of(recipe))
    for name, examples in parts.items():
        write_rows(folder / name, map(answer_row if answers else prompt_row, examples))
    return {name: len(examples) for name, examples in parts.items()}


def seed_of(recipe: Recipe) -> int:
    """The seed of a recipe's run."""
    return int(recipe.resolved()["seed"])


def sample_answers(
    recipe: Recipe, data: Path, folder: Path, sampling: Sampling, settings: RoundSettings, *, train: bool
) -> dict[str, Any]:
    """Let the model a recipe starts from answer the prompts in `data`, and measure it; every rank calls this.

    Answers to the training prompts (with `train`) go to `folder/own`, those to held-out prompts to `folder/held_out`.
    Returns figures for both, also written to `folder/figures.json`: how many answers, the share cut off, mean length in
    tokens, and where the data has answers of its own, their mean log-likelihood and length.
    """
    tokenizer, model = open_tokenizer(recipe), open_model(recipe)
    files = {HELD_OUT: data / TEST, **({OWN: data / TRAIN} if train else {})}
    examples = {name: read_data(file) for name, file in files.items() if file.is_file()}
    with opened_vllm(recipe, settings, model, tokenizer, folder) as vllm:
        manifests = {
            name: generate_to_disk(
                model,
                tokenizer,
                prompts,
                folder / name,
                sampling,
                batch_size=settings.generation_batch_size,
                shard_size=settings.shard_size,
                chat_template_kwargs=recipe.training.get("chat_template_kwargs"),
                vllm=vllm,
            )
            for name, prompts in examples.items()
        }
    figures: dict[str, Any] = {name: _counts(manifest) for name, manifest in manifests.items()}
    for name, prompts in examples.items():
        if prompts[0].completion is not None:
            figures[name] |= on_main(partial(_real, recipe, model, tokenizer, prompts[: settings.eval_prompts]))
    figures["model"] = next(iter(manifests.values()))["facts"]["model"]["weights"]
    on_main(lambda: write_figures(folder, figures))
    return figures


def report(recipe: Recipe, settings: RoundSettings, folder: Path, title: str) -> list[dict[str, Any]]:
    """Lay the models of all rounds side by side in the run's report, and on the screen; their figures."""
    rows = [figures_of_round(recipe, settings, number) for number in range(settings.rounds + 1)]
    rows = [row for row in rows if len(row) > 1]
    write_whole(folder / "rounds.json", json.dumps(rows, indent=1) + "\n")
    measured = {name: f"measured/{name}" for name in settings.measure}
    columns = {"round": "round", **{figure: name for name, figure in measured.items()}, **COLUMNS}
    panels = [*(_measured_panel(name, figure) for name, figure in measured.items()), *PANELS]
    table = write_rounds(Path(recipe.output_dir), rows, columns, panels, MEASURED + NOTE if measured else NOTE)
    say(f"{title}, the model at the start of each round:", table)
    return rows


def _measured_panel(name: str, figure: str) -> Panel:
    return Panel(figure, name, "mean over held-out answers", (Curve(figure, colour=GREEN, noisy=False),))


def figures_of_round(recipe: Recipe, settings: RoundSettings, number: int) -> dict[str, Any]:
    """The figures of one model by flat names: of its answers, and of the training that made it."""
    row: dict[str, Any] = {"round": number}
    for file in sorted(round_folder(recipe, number).glob(f"*/{FIGURES}")):
        figures = json.loads(file.read_text(encoding="utf-8"))
        row |= {"model": figures.pop("model")} if "model" in figures else {}
        row |= {f"{part}/{name}": value for part, values in figures.items() for name, value in values.items()}
    if number:
        results = model_folder(recipe, number - 1, settings.rounds) / RESULTS_FILE
        made = json.loads(results.read_text(encoding="utf-8"))
        row |= {f"train/{name}": made["train"][name] for name in TRAINED if name in made["train"]}
        row["train/pairs"] = made["data"]["train"]["kept"]
    return row


def check_opponent(model: str, answers: Path, trained: Path) -> None:
    """Raise `UserError` unless the reference of a round is the model that made the answers it was trained against.

    `model` is the SHA-256 of its weights. A loss that reads no reference leaves no record of one.
    """
    reference = recorded_weights(trained)
    if reference is not None and reference != model:
        raise UserError(
            f"{trained}: its reference is not the model that made the answers in {answers}. Delete both, and run again"
        )


def open_model(recipe: Recipe) -> Any:
    """The model that a recipe starts from, for inference."""
    section = recipe.model
    return load_model(
        str(section.model_name_or_path),
        dtype=section.dtype,
        revision=section.model_revision,
        trust_remote_code=section.trust_remote_code,
        attn_implementation=section.attn_implementation,
        quantization_config=quantization_config(section),
    )


def _counts(manifest: dict[str, Any]) -> dict[str, float]:
    count = manifest["answers"]
    return {
        "answers": count,
        "unfinished": 1 - manifest["finished"] / count,
        "tokens": manifest["tokens"] / count,
    }


def _real(recipe: Recipe, model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Mean log-likelihood of the data's own answers under a model, per token and per answer, and their length."""
    settings = recipe.resolved()
    lengths = {name: settings[name] for name in LENGTHS if name in settings}
    kwargs = recipe.training.get("chat_template_kwargs") or {}
    tokens = TokenSettings(**{**lengths, "max_dropped": 1.0, "chat_template_kwargs": kwargs})
    rows = tokenize_examples(examples, tokenizer, tokens).rows
    device = PartialState().device
    metrics = evaluate_model(model, tokenizer, rows, batch_size=8, device=device)["metrics"]
    return {
        "real_logp_per_token": metrics["logp_per_token/chosen"]["value"],
        "real_logp": metrics["logps/chosen"]["value"],
        "real_tokens": metrics["length/chosen"]["value"],
    }


def drawn(examples: Sequence[Example], most: int | None, seed: int) -> list[Example]:
    """At most so many of the examples, in their order; all where `most` is None."""
    if most is None or most >= len(examples):
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), most))]
