"""Examples -> token rows: the ids a model reads, where each answer begins, and which tokens are scored.

Borders and masks come from positions, never from comparing ids with the pad or end-of-sequence id, and no special token
is added after this step. Every row that is left out or changed is counted with its reason in a `TokenReport`.

Prompt and answer of a text row are tokenised apart: the prompt's ids are then the ones the model meets at generation
time, the same for both answers, and the two together give the text back. Conversations are rendered and tokenised as a
whole; where tokens merge over a border, that answer is tokenised piece by piece instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prefopt.data.answers import TARGET
from prefopt.data.columns import check_columns
from prefopt.data.drafting import CHUNK, DraftCache, draft_all
from prefopt.data.drafts import Draft, Drafter, DraftSettings, parts_of
from prefopt.data.templates import require_template
from prefopt.data.truncation import (
    IDENTICAL,
    TURN_LOST,
    Answer,
    Fitted,
    LengthPolicy,
    TokenReport,
    check_choice,
    fit,
)
from prefopt.data.turns import (
    SEGMENT_COLUMNS,
    SEGMENTS,
    TURN_SIDES,
    assistant_turns,
    segment_turns,
    token_weights,
    turn_of_tokens,
    turn_weights,
)
from prefopt.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.formats import Example

PROMPT_BOUNDARIES = ("generation_prompt", "common_prefix")
IDENTICAL_PAIRS = ("drop", "refuse")

OpenCache = Callable[[DraftSettings], DraftCache | None]


@dataclass(frozen=True)
class TokenSettings(LengthPolicy):
    """How examples become token rows; the fields about length are those of `LengthPolicy`.

    Attributes:
        max_dropped: largest share of the rows that may be lost to the length limit; beyond it tokenisation refuses.
        prompt_boundary: what to do where the prompt rendered for generation is not the start of the whole
            conversation, in text or in tokens. `generation_prompt` takes the generation prompt's ids and then the
            answer's; `common_prefix` keeps the ids they share and leaves the end of the prompt out (TRL's way).
        identical_pairs: `drop` or `refuse` pairs whose answers have the same ids: they teach nothing.
        chat_template_kwargs: arguments for the chat template; a row's own override them.
    """

    max_dropped: float = 0.01
    prompt_boundary: str = "generation_prompt"
    identical_pairs: str = "drop"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prompt_boundary", self.prompt_boundary, PROMPT_BOUNDARIES)
        check_choice("identical_pairs", self.identical_pairs, IDENTICAL_PAIRS)
        if not 0.0 <= self.max_dropped <= 1.0:
            raise UserError(f"max_dropped is {self.max_dropped}: it is a share of the rows, between 0 and 1")


class TokenizedData(NamedTuple):
    """Token rows and the account of how they came about.

    A row is a dict of `example_id`, `row`, `prompt_ids`, then `chosen_ids`, `rejected_ids`, `chosen_scored`,
    `rejected_scored` (a pair; with a target also `target_ids`, `target_scored`, and with segments what each token
    weighs in its own, `chosen_segment` and `rejected_segment`) or `completion_ids`, `completion_scored`, `desirable`,
    and `columns` (name -> float). Ids are int32 arrays and flags bool arrays, which hold a long data set in a tenth of
    the memory of lists.
    """

    rows: list[dict[str, Any]]
    report: TokenReport


def no_cache(settings: DraftSettings) -> None:
    """Keeps nothing."""


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    columns: tuple[str, ...] = (),
    optional_columns: tuple[str, ...] = (),
    *,
    processes: int | None = 1,
    open_cache: OpenCache = no_cache,
    turns: bool = False,
) -> TokenizedData:
    """Token rows of `examples`, in their order, with the `columns` the loss declares: numbers, `target`, `segments`.

    `turns`: the assistant's turns must be told apart in the tokens; where the loss declares `segments`, a row that
    loses a turn that counts to the length limit is left out. An optional column is carried along if every example has
    it and left out if none has. `processes` tokenise, as many as pay when it is None. `open_cache` gives the place
    where ids are kept from one run to the next. Neither changes what comes out.

    Raises:
        DataError: a row cannot be tokenised as it stands or lacks a column (it is named), nothing is left, or more than
            `settings.max_dropped` of the rows are lost to the length limit.
        UserError: the tokenizer lacks what the data needs: a chat template, an end-of-sequence token.
    """
    if not examples:
        raise DataError("there are no examples to tokenise")
    stray = next((example for example in examples if example.paired is not examples[0].paired), None)
    if stray is not None:
        raise DataError(f"{stray.where}: pairs and single answers are mixed. Make two data sets of them")
    chat = next((example for example in examples if isinstance(example.prompt, list)), None)
    if chat is not None:
        require_template(tokenizer, chat.where)
    names = _declared_columns(examples, columns, optional_columns)
    drafting = DraftSettings(settings.prompt_boundary, settings.chat_template_kwargs, targets=TARGET in names)
    drafter = Drafter(tokenizer, drafting)
    cache = open_cache(drafting) if len(examples) >= CHUNK else None
    report = TokenReport(len(examples))
    maker = _RowMaker(tokenizer, settings, names, report, turns, SEGMENTS in (*columns, *optional_columns))
    drafts = chain.from_iterable(draft_all(examples, drafter, processes, cache))
    made = (maker.row(example, draft) for example, draft in zip(examples, drafts, strict=True))
    rows = [row for row in made if row is not None]
    report.refuse(settings.max_dropped)
    report.measure(rows)
    return TokenizedData(rows, report)


class _RowMaker:
    """Turns drafts into token rows and keeps the report."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TokenSettings,
        columns: tuple[str, ...],
        report: TokenReport,
        turns: bool,
        whole_turns: bool,
    ) -> None:
        self._settings = settings
        self._columns = tuple(name for name in columns if name not in (TARGET, *SEGMENT_COLUMNS))
        self._targets = TARGET in columns
        self._turns = turns
        self._whole_turns = whole_turns
        self._segments = not set(SEGMENT_COLUMNS).isdisjoint(columns)
        self._report = report
        self._bos: int | None = tokenizer.bos_token_id

    def row(self, example: Example, draft: Draft) -> dict[str, Any] | None:
        """The token row of an example; None when it is left out."""
        prompt, answers, notes = draft
        self._refuse_two_bos(example, prompt[:2].tolist())
        if self._turns:
            _refuse_merged_turns(example, answers)
        if not len(prompt):
            for answer in answers:
                answer.scored[:1] = False  # no hidden state predicts the first token
        if len(answers) > 1 and np.array_equal(answers[0].ids, answers[1].ids):
            self._leave_out_identical(example)
            return None
        fitted = fit(prompt, answers, self._settings, bos_token_id=self._bos)
        if self._whole_turns and fitted.reason is None and _lost_turn(example, fitted):
            fitted = replace(fitted, reason=TURN_LOST)
        if fitted.reason is not None:
            lengths = " and ".join(str(len(answer.ids)) for answer in answers)
            self._report.drop(
                fitted.reason,
                f"{example.where} (prompt {len(prompt)} tokens, {lengths} after it; limit {self._settings.max_length})",
            )
            return None
        for note in (*notes, *_cuts(fitted)):
            self._report.note(note, str(example.where))
        if self._turns and any(map(_fewer_turns, answers, fitted.answers)):
            self._report.note("turns_cut", str(example.where))
        return self._token_row(example, fitted)

    def _token_row(self, example: Example, fitted: Fitted) -> dict[str, Any]:
        row: dict[str, Any] = {
            "example_id": example.example_id,
            "row": example.where.row,
            "prompt_ids": fitted.prompt,
        }
        for part, answer in zip(parts_of(example, self._targets), fitted.answers, strict=True):
            row[f"{part}_ids"], row[f"{part}_scored"] = answer
            if self._segments and part in TURN_SIDES:
                row[f"{part}_segment"] = token_weights(answer.scored, turn_weights(example, part))
        if example.desirable is not None:
            row["desirable"] = example.desirable
        row["columns"] = {name: float(example.columns[name]) for name in self._columns}
        return row

    def _leave_out_identical(self, example: Example) -> None:
        if self._settings.identical_pairs == "refuse":
            raise DataError(
                f"{example.where}: chosen and rejected are the same tokens, so the pair teaches nothing. Remove the "
                "row, or leave such rows out with `identical_pairs: drop`"
            )
        self._report.drop(IDENTICAL, str(example.where))

    def _refuse_two_bos(self, example: Example, start: list[int]) -> None:
        if self._bos is not None and start == [self._bos, self._bos]:
            cause = (
                "the text begins with it and the tokenizer adds another. Remove it from the text"
                if isinstance(example.prompt, str)
                else "the chat template writes it twice, or a message begins with it. Remove one of the two"
            )
            raise DataError(f"{example.where}, prompt: two beginning-of-sequence tokens in a row: {cause}")


def _declared_columns(
    examples: Sequence[Example], required: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[str, ...]:
    problems = check_columns(examples, required, optional)
    if problems:
        more = f" ({len(problems) - 1} more rows like it)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    return (*required, *(name for name in optional if examples[0].columns.get(name) is not None))


def _refuse_merged_turns(example: Example, answers: Sequence[Answer]) -> None:
    """Refuse a conversation whose template writes nothing between two turns of the assistant."""
    for side, answer in zip(TURN_SIDES if example.paired else ("completion",), answers, strict=False):
        wanted, found = assistant_turns(getattr(example, side)), _turns_in(answer)
        if found != wanted:
            raise DataError(
                f"{example.where}, {side}: {wanted} assistant turns are {found} runs of scored tokens, so the turns "
                "cannot be told apart. Use a chat template that marks every message"
            )


def _turns_in(answer: Answer) -> int:
    return int(turn_of_tokens(answer.scored)[-1]) + 1 if answer.scored.any() else 0


def _fewer_turns(whole: Answer, cut: Answer) -> bool:
    return len(cut.ids) < len(whole.ids) and _turns_in(cut) < _turns_in(whole)


def _lost_turn(example: Example, fitted: Fitted) -> bool:
    """Whether the length limit took the whole of a turn that counts."""
    pair = zip(TURN_SIDES, fitted.answers, strict=False)
    return any(_turns_in(answer) <= max(segment_turns(example, side)) for side, answer in pair)


def _cuts(fitted: Fitted) -> list[str]:
    """What the length limit did to a row that is kept."""
    notes = ["prompt_cut"] if fitted.prompt_cut else []
    if any(fitted.cut):
        notes.append("eos_cut")
    pair = fitted.cut[:2]
    if any(pair) and not all(pair):
        notes.append("eos_cut_one_sided")
    return notes
