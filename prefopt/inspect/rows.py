"""A row of a recipe's data as stretches of tokens: whose words they are, what is scored, and how much it counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data.answers import sides_in
from prefopt.data.collation import Row
from prefopt.data.drafts import TextEncoder
from prefopt.data.formats import Example, RowParser
from prefopt.data.opening import open_source
from prefopt.data.problems import BadRow, Problem, RawRow
from prefopt.data.spec import DataSpec
from prefopt.data.supervised import as_supervised
from prefopt.data.templates import ChatRenderer
from prefopt.data.turns import turn_of_tokens
from prefopt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.prepare import Preparation


@dataclass(frozen=True)
class Token:
    """A token as text, and what is known of it: `logp`, `before`, `after` and `kl` in nats, where a model scored it."""

    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are one role's, or one turn's.

    `turn` counts the scored turns of an answer from 0, and is None where nothing is scored; `weight` is what the turn
    counts in the row's segment, 1 where rows have no segment.
    """

    role: str
    tokens: tuple[Token, ...]
    turn: int | None = None
    weight: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether the loss reads these tokens."""
        return self.turn is not None and self.weight != 0

    def total(self, name: str) -> float:
        """Sum of a number over the tokens, without the weight."""
        return sum(token.numbers[name] for token in self.tokens)


@dataclass(frozen=True)
class RowView:
    """A row: where it stands, the stretches of its prompt, and those of each answer; `numbers` are the names known."""

    where: str
    prompt: tuple[Stretch, ...]
    answers: Mapping[str, tuple[Stretch, ...]]
    notes: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    def counted(self, side: str, name: str) -> float:
        """Sum of a number over the tokens of an answer, each turn times its weight in the segment."""
        turns = (stretch for stretch in self.answers[side] if stretch.turn is not None)
        return sum(turn.weight * turn.total(name) for turn in turns)

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens of each answer count."""
        return {
            side: sum(len(stretch.tokens) for stretch in stretches if stretch.counts)
            for side, stretches in self.answers.items()
        }

    @property
    def margin(self) -> str | None:
        """The plain log-ratio margin of what counts, in words; None without models or without a pair.

        What a loss makes of the row (its own weights of turns, means, divergences) is not in it.
        """
        if "after" not in self.numbers or not {"chosen", "rejected"} <= self.answers.keys():
            return None
        chosen, rejected = (self.counted(side, "after") for side in ("chosen", "rejected"))
        return (
            f"plain log-ratio to the reference after training, summed over what counts: chosen {chosen:+.3f}, "
            f"rejected {rejected:+.3f}, margin {chosen - rejected:+.3f} nats"
        )


def raw_row(spec: DataSpec, number: int) -> RawRow:
    """A row as its source holds it, counted from 0. Raises `DataError` where there is none that can be read."""
    rows = (row for entry in spec.mixture or (spec,) for _, rows in open_source(entry) for row in rows)
    found = next(islice(rows, number, None), None) if number >= 0 else None
    if found is None:
        raise DataError(f"{spec.title}: there is no row {number}; rows are counted from 0")
    if isinstance(found, Problem):
        raise BadRow(found)
    return found


def token_row(raw: RawRow, preparation: Preparation) -> tuple[Example, Row, tuple[str, ...]]:
    """A row as an example and as training reads it, with what was noted on the way. Raises `DataError` where training
    would refuse the row or leave it out."""
    example = RowParser().parse(as_supervised(raw) if preparation.unlabelled else raw)
    try:
        data = preparation.one([raw.values], "row")
    except DataError as error:
        raise DataError(f"{raw.where}: {str(error).replace('row, row 0', 'the row')}") from error
    return example, data[0], tuple(data.reports["tokens"]["noted"])


def view_of(example: Example, row: Row, notes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> RowView:
    """The stretches of a row, before any model has scored it."""
    texts = {part: _texts(row[f"{part}_ids"], tokenizer) for part in ("prompt", *sides_in(row))}
    answers = {side: tuple(_answer(example, row, side, texts[side])) for side in sides_in(row)}
    return RowView(str(example.where), tuple(_prompt(example, row, texts["prompt"], tokenizer)), answers, tuple(notes))


def with_numbers(view: RowView, row: Row, numbers: Mapping[str, Mapping[str, Sequence[float]]]) -> RowView:
    """The view with numbers for the scored tokens of each answer: `{side: {name: [scored tokens]}}`."""
    answers = {side: tuple(_numbered(stretches, numbers[side])) for side, stretches in view.answers.items()}
    return replace(view, answers=answers, numbers=tuple(next(iter(numbers.values()))))


def _numbered(stretches: Sequence[Stretch], numbers: Mapping[str, Sequence[float]]) -> Iterator[Stretch]:
    rows = iter([dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)])
    for stretch in stretches:
        scored = stretch.turn is not None
        yield (
            replace(stretch, tokens=tuple(replace(t, numbers=next(rows)) for t in stretch.tokens))
            if scored
            else stretch
        )


def _texts(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in np.asarray(ids).tolist()]


def _prompt(example: Example, row: Row, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Stretch]:
    borders = _message_borders(example, row, tokenizer)
    for (start, role), (stop, _) in pairwise([*borders, (len(texts), "")]):
        if stop > start:
            yield Stretch(role, tuple(map(Token, texts[start:stop])))


def _message_borders(example: Example, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Where each message of the prompt begins, with its role; the prompt is one stretch where that cannot be told."""
    if isinstance(example.prompt, str):
        return [(0, "prompt")]
    renderer, encoder, ids = ChatRenderer(tokenizer), TextEncoder(tokenizer), np.asarray(row["prompt_ids"]).tolist()
    borders, start = [], 0
    for count, message in enumerate(example.prompt, start=1):
        borders.append((start, str(message["role"])))
        try:
            text = renderer.text(example, "prompt", list(example.prompt[:count]))
        except DataError:
            return [(0, "prompt")]
        begun = encoder.many([text])[text]
        if ids[: len(begun)] != begun:
            return [(0, "prompt")]
        start = len(begun)
    return [*borders, (start, "header of the answer")]


def _answer(example: Example, row: Row, side: str, texts: list[str]) -> Iterator[Stretch]:
    scored = np.asarray(row[f"{side}_scored"])
    weights = np.asarray(row.get(f"{side}_segment", np.ones(len(scored))))
    turns = np.full(len(scored), -1)
    turns[scored] = turn_of_tokens(scored)
    between, seen = _roles_between(example, side), 0
    for turn, places in groupby(range(len(scored)), key=lambda place: int(turns[place])):
        at = list(places)
        tokens = tuple(Token(texts[place]) for place in at)
        if turn >= 0:
            seen = turn + 1
            yield Stretch("assistant", tokens, turn, float(weights[at[0]]))
        else:
            yield Stretch(between[seen] if seen < len(between) else "end", tokens)


def _roles_between(example: Example, side: str) -> list[str]:
    """The roles of the messages before each turn of the assistant."""
    part = getattr(example, side, None)
    if not isinstance(part, list):
        return []
    runs = [
        (is_ours, [str(m["role"]) for m in run]) for is_ours, run in groupby(part, lambda m: m["role"] == "assistant")
    ]
    return ["header", *(" + ".join(dict.fromkeys(roles)) for is_ours, roles in runs if not is_ours)]
