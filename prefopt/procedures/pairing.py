"""Rows on their way through a procedure with rounds: the data's own answers, and pairs with sampled ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.console import say
from prefopt.data.formats import Example
from prefopt.data.problems import Where
from prefopt.report.results import write_whole

TRAIN, TEST, SUPERVISED, FIGURES = "train.jsonl", "test.jsonl", "supervised.jsonl", "figures.json"


def read_data(path: Path) -> list[Example]:
    """The examples whose rows `write_data` wrote to a file, in their order; `completion` is None for a prompt alone."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Example(
            "",
            row["prompt"],
            completion=row.get("completion"),
            desirable=True,
            tools=row.get("tools"),
            chat_template_kwargs=row.get("chat_template_kwargs") or {},
            unfinished=tuple(row.get("unfinished", ())),
            columns=row.get("columns") or {},
            where=Where(str(path), number, number + 1),
        )
        for number, row in enumerate(rows)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_held_out(path: Path, rows: Sequence[dict[str, Any]], why_none: str) -> None:
    """Write the held-out pairs of a round. None at all is said, and leaves no file: the round trains without them."""
    if rows:
        write_rows(path, rows)
        return
    path.unlink(missing_ok=True)  # of an attempt before
    say(f"no held-out pair could be made: {why_none}")


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a stage, for the report of all rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FIGURES, json.dumps(figures, indent=1) + "\n")


def prompt_row(example: Example) -> dict[str, Any]:
    """The prompt of an example as a row."""
    return {"prompt": example.prompt, **example.beside_messages}


def answer_row(example: Example) -> dict[str, Any]:
    """An example as a row: its prompt and its good answer."""
    answer = {"completion": example.completion, "label": True, "unfinished": list(example.unfinished)}
    return {"prompt": example.prompt, **answer, **example.beside_messages}


def pair_row(example: Example, chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    """A row of preference data with the prompt of an example."""
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected, **example.beside_messages, **columns}


def as_answer(example: Example, text: str) -> Any:
    """A sampled text as an answer of the example's own kind."""
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
