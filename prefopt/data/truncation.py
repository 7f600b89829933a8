"""What happens to rows longer than `max_length`, and the account of every row that was cut, changed or left out.

Cutting an answer takes its end marker away. When that happens to one answer of a pair only, the loss sees a length
bias that no one asked for, so every cut is reported and `cut_answers` offers two ways to avoid it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt.data.problems import Tally
from prefopt.errors import DataError, UserError, nearest

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]

TRUNCATION_MODES = ("keep_start", "keep_end", "drop")
CUT_ANSWERS = ("keep", "drop", "same_length")

# Why a row is left out, in the words of the report.
TOO_LONG = "too_long"
PROMPT_TOO_LONG = "prompt_too_long"
ANSWER_CUT = "answer_cut"
NO_SIGNAL = "no_signal_after_truncation"
TURN_LOST = "turn_lost"
IDENTICAL = "identical_after_tokenising"
LENGTH_REASONS = (TOO_LONG, PROMPT_TOO_LONG, ANSWER_CUT, NO_SIGNAL, TURN_LOST)

_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


class Answer(NamedTuple):
    """One completion: token ids `[N]` and, for each of them, whether it is scored."""

    ids: Ids
    scored: Flags

    def cut(self, length: int) -> Answer:
        """The first `length` tokens."""
        return Answer(self.ids[:length], self.scored[:length])


@dataclass(frozen=True)
class LengthPolicy:
    """The length limit of a row and what to do with rows beyond it.

    Attributes:
        max_length: most tokens of prompt + answer, for each answer of a row by itself; None means no limit.
        truncation_mode: `keep_start` keeps the prompt whole and cuts answers at their end. `keep_end` cuts the prompt
            from the left (a BOS at its front stays), and answers at their end only when the prompt is down to
            `min_prompt_tokens`. `drop` leaves every over-long row out.
        cut_answers: what to do when an answer must be cut and so loses its end marker. `keep` keeps the row;
            `drop` leaves it out; `same_length` cuts both answers of the pair to one length at which neither keeps its
            end marker (single completions, and a pair whose target alone is cut, are kept).
        min_prompt_tokens: fewest prompt tokens `keep_end` leaves, BOS included.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    cut_answers: str = "keep"
    min_prompt_tokens: int = 16

    def __post_init__(self) -> None:
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        check_choice("cut_answers", self.cut_answers, CUT_ANSWERS)
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}: it must hold a prompt token and an answer token (>= 2)")
        if self.min_prompt_tokens < 1:
            raise UserError(f"min_prompt_tokens is {self.min_prompt_tokens}: it must be at least 1")
        squeezed = self.max_length is not None and self.min_prompt_tokens >= self.max_length
        if squeezed and self.truncation_mode == "keep_end":
            raise UserError(
                f"min_prompt_tokens ({self.min_prompt_tokens}) leaves no room for an answer within max_length "
                f"({self.max_length}): lower the one or raise the other"
            )


@dataclass(frozen=True)
class Fitted:
    """A row within the limit, or the reason why there is none (`reason` set; the other fields are as they were).

    Attributes:
        cut: for each answer, whether its end was cut.
        prompt_cut: whether the front of the prompt was cut.
    """

    prompt: Ids
    answers: tuple[Answer, ...]
    cut: tuple[bool, ...] = ()
    prompt_cut: bool = False
    reason: str | None = None


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises `UserError` unless `value` is one of the words a setting takes."""
    if value not in allowed:
        raise UserError(f"{name} is {value!r}: write one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def fit(prompt: Ids, answers: tuple[Answer, ...], policy: LengthPolicy, *, bos_token_id: int | None = None) -> Fitted:
    """One row (a prompt and an answer, or the two of a pair and their target) made to keep within `policy.max_length`.

    A row that would hold an answer without a scored token, or two equal answers, is never returned as usable: its
    reason says what became of it.
    """
    row = Fitted(prompt, answers, cut=(False,) * len(answers))
    longest = max(len(answer.ids) for answer in answers)
    if policy.max_length is not None and len(prompt) + longest > policy.max_length:
        row = _shorten(row, longest, policy, bos_token_id)
    if row.reason is None and _no_signal(row.answers):
        return replace(row, reason=NO_SIGNAL)
    return row


def _shorten(row: Fitted, longest: int, policy: LengthPolicy, bos_token_id: int | None) -> Fitted:
    limit = policy.max_length
    assert limit is not None
    if policy.truncation_mode == "drop":
        return replace(row, reason=TOO_LONG)
    if policy.truncation_mode == "keep_end":
        room = max(limit - longest, min(policy.min_prompt_tokens, len(row.prompt)))
        prompt = _cut_left(row.prompt, room, bos_token_id)
        row = replace(row, prompt=prompt, prompt_cut=len(prompt) < len(row.prompt))
    room = limit - len(row.prompt)
    if room < 1:
        return replace(row, reason=PROMPT_TOO_LONG)
    cut = tuple(len(answer.ids) > room for answer in row.answers)
    if any(cut) and policy.cut_answers == "drop":
        return replace(row, cut=cut, reason=ANSWER_CUT)
    lengths = [room] * len(cut)
    if any(cut[:2]) and policy.cut_answers == "same_length" and len(cut) > 1:
        lengths[:2] = [min(room, *(len(answer.ids) - 1 for answer in row.answers[:2]))] * 2
        cut = (True, True, *cut[2:])
    answers = tuple(answer.cut(length) for answer, length in zip(row.answers, lengths, strict=True))
    return replace(row, cut=cut, answers=answers)


def _cut_left(prompt: Ids, room: int, bos_token_id: int | None) -> Ids:
    if len(prompt) <= room:
        return prompt
    if bos_token_id is not None and prompt[0] == bos_token_id:
        return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1 :]])
    return prompt[len(prompt) - room :]


def _no_signal(answers: tuple[Answer, ...]) -> bool:
    if any(not answer.scored.any() for answer in answers):
        return True
    return len(answers) > 1 and np.array_equal(answers[0].ids, answers[1].ids)


@dataclass
class TokenReport:
    """What became of the examples.

    Attributes:
        examples: number of examples read.
        kept: number of rows made of them.
        dropped: reason -> rows left out: `too_long`, `prompt_too_long`, `answer_cut`, `no_signal_after_truncation`
            (the answers became equal, or nothing scored is left of one), `turn_lost` (nothing is left of a turn that
            counts), `identical_after_tokenising`.
        noted: what happened to rows that were kept: `eos_cut` (an answer lost its end marker), `eos_cut_one_sided`,
            `turns_cut` (nothing is left of an assistant turn, where no loss asks for segments), `prompt_cut`,
            `eos_appended` (the chat template marks no end), `prompt_not_prefix` (the prompt rendered for generation is
            not how the whole conversation begins).
        tokens: totals over the rows kept: `prompt`, each answer, `scored`, `plain` (prompt counted with every answer,
            no padding) and `shared` (prompt counted once a row).
        lengths: part (`prompt`, each answer, `row` = prompt + longest answer) -> percentiles, in tokens.
    """

    examples: int
    kept: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Counts a row that is left out."""
        self.dropped.setdefault(reason, Tally()).add(where)

    def note(self, reason: str, where: str) -> None:
        """Counts a row that is kept but not as it came."""
        self.noted.setdefault(reason, Tally()).add(where)

    def measure(self, rows: Sequence[dict[str, Any]]) -> None:
        """Fills in `kept`, `tokens` and `lengths` from the rows that were kept (at least one)."""
        self.kept = len(rows)
        sides = [name for name in ("chosen", "rejected", "completion", "target") if f"{name}_ids" in rows[0]]
        parts = {name: np.array([len(row[f"{name}_ids"]) for row in rows]) for name in ("prompt", *sides)}
        answers = sum(parts[side] for side in sides)
        self.tokens = {name: int(lengths.sum()) for name, lengths in parts.items()}
        self.tokens["scored"] = int(sum(row[f"{side}_scored"].sum() for row in rows for side in sides))
        self.tokens["plain"] = int((len(sides) * parts["prompt"] + answers).sum())
        self.tokens["shared"] = int((parts["prompt"] + answers).sum())
        parts["row"] = parts["prompt"] + np.max([parts[side] for side in sides], axis=0)
        self.lengths = {name: _percentiles(lengths) for name, lengths in parts.items()}

    def refuse(self, max_dropped: float) -> None:
        """Raises `DataError` if no row is left, or more than the share `max_dropped` is lost to the length limit."""
        lost = sum(tally.count for reason, tally in self.dropped.items() if reason in LENGTH_REASONS)
        left = self.examples - sum(tally.count for tally in self.dropped.values())
        if left and lost <= max_dropped * self.examples:
            return
        reasons = "; ".join(f"{reason}: {tally}" for reason, tally in self.dropped.items())
        if not lost:
            raise DataError(f"nothing to learn: all {self.examples} rows are left out. {reasons}")
        problem = f"{lost} of {self.examples} rows are lost to the length limit"
        remedy = f"Raise `max_length`{', or accept the loss with `max_dropped: 1.0`' if left else ''}"
        raise DataError(f"{problem} (max_dropped is {max_dropped:g}). {reasons}. {remedy}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        lines = [f"{self.kept} of {self.examples} rows kept, {self.tokens['plain'] / self.kept:.1f} tokens each"]
        lines += [f"left out, {reason}: {tally}" for reason, tally in sorted(self.dropped.items())]
        lines += [f"kept, {reason}: {tally}" for reason, tally in sorted(self.noted.items())]
        for part, marks in self.lengths.items():
            lines.append(f"{part} tokens: " + ", ".join(f"{name} {value}" for name, value in marks.items()))
        return lines


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    # "higher": a length some row really has, so that a limit read off this table is not one token short.
    return {name: int(np.percentile(lengths, mark, method="higher")) for name, mark in _PERCENTILES.items()}
