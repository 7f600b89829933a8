"""Rows on their way through a procedure with rounds: the data's own answers, and pairs with sampled ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefopt.data.formats import Example
from prefopt.data.messages import check_not_empty, check_text
from prefopt.data.problems import Flaw
from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.report.results import write_whole

TRAIN, TEST = "train.jsonl", "test.jsonl"


def read_data(path: Path) -> list[Example]:
    """The examples whose rows were written to a file, in their order."""
    return load_examples(DataSpec(data_files=str(path))).examples


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def answer_row(example: Example) -> dict[str, Any]:
    """An example as a row: its prompt and its good answer."""
    return {"prompt": example.prompt, "completion": example.completion, "label": True, **_besides(example)}


def pair_row(example: Example, chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    """A row of preference data with the prompt of an example."""
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected, **_besides(example), **columns}


def as_answer(example: Example, text: str) -> Any:
    """A sampled text as an answer of the example's own kind."""
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]


def usable(text: str) -> bool:
    """Whether a data set may hold an answer: it has a visible character and nothing that is no text."""
    try:
        check_not_empty("answer", text)
        check_text("answer", text)
    except Flaw:
        return False
    return True


def _besides(example: Example) -> dict[str, Any]:
    """What a conversation's template reads beside its messages."""
    said = {"tools": example.tools, "chat_template_kwargs": example.chat_template_kwargs or None}
    return {name: value for name, value in said.items() if value is not None}
