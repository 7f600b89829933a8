"""Tasks and episodes of a procedure with an environment, on disk: what is played, and the pairs it makes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.console import say
from prefopt.data.formats import Example
from prefopt.data.judge import BadBounds
from prefopt.data.messages import Message
from prefopt.data.parting import Parted, cut, first_difference, up_to_turn
from prefopt.data.segments import Selector
from prefopt.data.sources import load_train_test
from prefopt.data.turns import assistant_turns
from prefopt.environments import environment_facts, open_environment
from prefopt.environments.opening import environment_name
from prefopt.environments.playing import TURN_LIMIT, WHOLE, Played, play, room_of
from prefopt.errors import DataError
from prefopt.generation import Sampling
from prefopt.models import holds_adapter, model_config
from prefopt.procedures.answers import drawn, open_model, seed_of
from prefopt.procedures.exploring import ExploringSettings
from prefopt.procedures.pairing import (
    FIGURES,
    SUPERVISED,
    TEST,
    TRAIN,
    answer_row,
    pair_row,
    read_data,
    write_figures,
    write_rows,
)
from prefopt.procedures.rounds import HELD_OUT, OWN
from prefopt.procedures.train import BAD_ROWS, open_tokenizer
from prefopt.ranks import on_main
from prefopt.recipe import Recipe
from prefopt.reference.hashing import hash_json
from prefopt.reference.identity import identify

EPISODES = "episodes.jsonl"
REWARD = "reward"
LONGER = 5  # turns by which the authors let a failure outlast the expert's trajectory


# Tasks


def write_tasks(recipe: Recipe, folder: Path, settings: ExploringSettings) -> dict[str, int]:
    """Write the tasks of a recipe's data to `train.jsonl` and, where it has held-out rows, `test.jsonl`; for a
    supervised start also every trajectory, to `supervised.jsonl`.

    At most `settings.prompts` and `settings.eval_prompts` tasks, drawn with the recipe's seed; returns how many.
    Raises `DataError` for rows that are no conversation or say no reward, and `UserError` for turns longer than all of
    the model's positions.
    """
    if not holds_adapter(recipe.model):  # whose base says it when it is loaded
        room_of(model_config(recipe.model), settings.max_new_tokens)
    rules = {name: recipe.training[name] for name in BAD_ROWS if name in recipe.training}
    needed = {"required_columns": (REWARD,), "needed_by": "procedure"}
    train, test = load_train_test(recipe.data_spec(), supervised=True, **needed, **rules)
    say(*(f"data: {line}" for line in train.report.lines()))
    parts = {TRAIN: drawn(train.examples, settings.prompts, seed_of(recipe))}
    if test is not None:
        parts[TEST] = drawn(test.examples, settings.eval_prompts, seed_of(recipe))
    for name, examples in parts.items():
        write_rows(folder / name, map(task_row, examples))
    if "start" in recipe.procedure:
        write_rows(folder / SUPERVISED, map(answer_row, train.examples))
    return {name: len(examples) for name, examples in parts.items()}


def task_row(example: Example) -> dict[str, Any]:
    """A task as a row: the expert's trajectory, and the columns that the environment reads.

    Raises `DataError` for a text, and where a column is more than JSON can hold.
    """
    if example.kind != "chat":
        raise DataError(f"{example.where}: a task is a conversation; write `prompt` and `completion` as messages")
    row = {**answer_row(example), "columns": example.columns}
    try:
        json.dumps(row)
    except TypeError as error:
        raise DataError(f"{example.where}: the columns of a task go to the environment as JSON: {error}") from None
    return row


# Episodes


def explore_tasks(
    recipe: Recipe, files: Mapping[str, Path], folder: Path, settings: ExploringSettings, sampling: Sampling
) -> dict[str, Any]:
    """Let the model a recipe starts from try the tasks of each file that is there; every rank calls this.

    Episodes go to `folder/NAME` by the file's name. Returns the figures of each, also written to `folder/figures.json`,
    and as `model` the SHA-256 of the weights.
    """
    tokenizer, model = open_tokenizer(recipe), open_model(recipe).to(PartialState().device)
    kwargs = recipe.training.get("chat_template_kwargs")
    figures: dict[str, Any] = {
        name: explore(model, tokenizer, read_data(file), folder / name, settings, sampling, kwargs)
        for name, file in files.items()
        if file.is_file()
    }
    figures["model"] = identify(model).weights
    on_main(lambda: write_figures(folder, figures))
    return figures


def explore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Example],
    folder: Path,
    settings: ExploringSettings,
    sampling: Sampling,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Let a model try every task once and write `episodes.jsonl`; every rank calls this and plays its share.

    A line holds the `messages` after the task's prompt, `ended`, `turns`, `reward`, and `by`, a hash of the model, the
    environment, the tasks and the settings. A stretch of `shard_size` tasks is played by one rank from its beginning to
    its end, so the file is the same for any number of ranks; stretches that are there already are kept. Returns figures
    (see `episode_figures`). Raises `UserError` for an environment that fails, with the task.
    """
    state, path, size = PartialState(), folder / EPISODES, settings.shard_size
    rules = [environment_facts(settings.environment), asdict(sampling), settings.max_turns, size]
    rules += [settings.generation_batch_size, chat_template_kwargs, tokenizer.chat_template, tokenizer.get_vocab()]
    by = hash_json([identify(model).key, rules, [task_row(task) for task in tasks]])[:16]
    if not on_main(lambda: _is_of(path, by)):
        stretches = {folder / f"_{by}-{start:06d}.jsonl": start for start in range(0, len(tasks), size)}
        missing = on_main(lambda: [each for each in stretches if not each.is_file()])
        hidden = None if state.is_main_process else True
        own = missing[state.process_index :: state.num_processes]
        for each in tqdm(own, desc="Exploring", unit=f"x{size} tasks", disable=hidden):
            played = play(
                open_environment(settings.environment),
                {number: tasks[number] for number in range(stretches[each], min(stretches[each] + size, len(tasks)))},
                model,
                tokenizer,
                sampling,
                max_turns=settings.max_turns,
                batch_size=settings.generation_batch_size,
                name=environment_name(settings.environment),
                chat_template_kwargs=chat_template_kwargs,
            )
            write_rows(each, (_line(episode, by) for episode in played))
        state.wait_for_everyone()
        on_main(lambda: _join(list(stretches), path))
    return on_main(lambda: episode_figures(list(_lines(path)), settings.success))


def episode_figures(lines: Sequence[Mapping[str, Any]], success: float) -> dict[str, float]:
    """How many episodes there are, their mean reward, the share whose reward reaches `success`, mean turns of the
    agent, and the shares that ended at the limit of turns, or before a turn that was cut off, no text or without room.
    """
    return {
        "episodes": len(lines),
        "reward": fmean(line["reward"] for line in lines),
        "success": fmean(line["reward"] >= success for line in lines),
        "turns": fmean(line["turns"] for line in lines),
        "turn_limit": fmean(line["ended"] == TURN_LIMIT for line in lines),
        "cut_off": fmean(line["ended"] not in WHOLE for line in lines),
    }


def count_again(folder: Path, success: float) -> None:
    """Write the figures of the episodes in a folder anew: what counts as a success may have changed since."""
    path = folder / FIGURES
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in (OWN, HELD_OUT):
        if part in figures:
            figures[part] = episode_figures(list(_lines(folder / part / EPISODES)), success)
    if figures:
        write_figures(folder, figures)


def _line(played: Played, by: str) -> dict[str, Any]:
    said = {"messages": played.messages, "ended": played.ended, "turns": played.turns, "reward": played.reward}
    return {"task": played.number, **said, "by": by}


def _is_of(path: Path, by: str) -> bool:
    return path.is_file() and next(_lines(path))["by"] == by


def _join(parts: Sequence[Path], path: Path) -> None:
    write_rows(path, (line for part in parts for line in _lines(part)))
    for part in parts:
        part.unlink()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


# Pairs


def trajectory_pairs(
    tasks: Sequence[Example], folder: Path, select: Selector | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Pairs of the expert's trajectory and the model's own, whichever earned more first; and counts.

    An own one that earned less is cut to the expert's number of turns and `LONGER` more. Ties make no pair, nor do
    episodes without an end of their own. With `select` the pairs are cut to segments, and what it refuses is left out.
    """
    counts: Counter[str] = Counter()
    rows = []
    for task, line in zip(tasks, _lines(folder / EPISODES), strict=True):
        expert = float(task.columns[REWARD])
        if line["ended"] not in WHOLE:
            counts["left out: cut off, no text or no room"] += 1
        elif line["reward"] == expert or line["messages"] == task.completion:
            counts["ties"] += 1
        else:
            row = _pair(task, line["messages"], line["reward"], expert)
            try:
                rows.append(row if select is None else _segment(row, select))
            except BadBounds as reason:
                counts[f"left out: {reason.kind}"] += 1
    counts["pairs"] = len(rows)
    return rows, counts


def _pair(task: Example, own: list[Message], reward: float, expert: float) -> dict[str, Any]:
    open_end = bool(task.unfinished)
    if reward > expert:
        columns = {"score_chosen": reward, "score_rejected": expert, "unfinished": ["rejected"] if open_end else []}
        return pair_row(task, own, task.completion, **columns)
    own = up_to_turn(own, assistant_turns(task.completion) + LONGER)
    columns = {"score_chosen": expert, "score_rejected": reward, "unfinished": ["chosen"] if open_end else []}
    return pair_row(task, task.completion, own, **columns)


def _segment(row: dict[str, Any], select: Selector) -> dict[str, Any]:
    """The pair cut to its segment, other columns kept."""
    chosen, rejected = ([*row["prompt"], *row[side]] for side in ("chosen", "rejected"))
    pair = Parted(chosen, rejected, first_difference(chosen, rejected), row)
    return {**row, **cut(pair, *select(pair))}
