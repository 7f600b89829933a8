"""Examples -> token rows: the ids a model reads, where each answer begins, and which tokens are scored.

Borders and masks come from positions, never from comparing ids with the pad or end-of-sequence id, and no special token
is added after this step. Every row that is left out or changed is counted with its reason in a `TokenReport`.

Prompt and answer of a text row are tokenised apart: the prompt's ids are then the ones the model meets at generation
time, the same for both answers, and the two together give the text back. Conversations are rendered and tokenised as a
whole; where tokens merge over a border, that answer is tokenised piece by piece instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from prefopt.data.answers import TARGET
from prefopt.data.columns import check_columns, target_of
from prefopt.data.templates import (
    ChatRenderer,
    Piece,
    RenderedRow,
    Tokens,
    border_texts,
    common_prefix_tokens,
    joint_tokens,
    require_template,
)
from prefopt.data.truncation import IDENTICAL, Answer, Fitted, Ids, LengthPolicy, TokenReport, check_choice, fit
from prefopt.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.formats import Example

PROMPT_BOUNDARIES = ("generation_prompt", "common_prefix")
IDENTICAL_PAIRS = ("drop", "refuse")

_CHUNK = 1000  # examples per round of calls to the tokenizer


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
    `rejected_scored` (a pair; with a target also `target_ids`, `target_scored`) or `completion_ids`,
    `completion_scored`, `desirable`, and `columns` (name -> float).
    Ids are int32 arrays and flags bool arrays, which hold a long data set in a tenth of the memory of lists.
    """

    rows: list[dict[str, Any]]
    report: TokenReport


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenSettings,
    columns: tuple[str, ...] = (),
    optional_columns: tuple[str, ...] = (),
) -> TokenizedData:
    """Token rows of `examples`, in their order, with the `columns` the loss declares: numbers, and `target`.

    An optional column is carried along if every example has it and left out if none has.

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
    report = TokenReport(len(examples))
    maker = _RowMaker(tokenizer, settings, _declared_columns(examples, columns, optional_columns), report)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(examples), desc="Tokenising", disable=len(examples) <= _CHUNK) as bar:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            rows += maker.rows(chunk)
            bar.update(len(chunk))
    report.refuse(settings.max_dropped)
    report.measure(rows)
    return TokenizedData(rows, report)


class TextEncoder:
    """Text to ids without special tokens, many texts in one call of the tokenizer.

    `prefix` holds the ids this tokenizer puts before a text of its own accord (a BOS, or nothing).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        plain = self.many(["a"])["a"]
        marked = list(tokenizer("a")["input_ids"])
        fits = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
        self.prefix: list[int] = marked[: next(fits, 0)]
        # SentencePiece-like tokenizers put a blank before every text, which a continuation must not get.
        self._adds_blank = tokenizer.decode(plain + plain, clean_up_tokenization_spaces=False) != "aa"

    def many(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each text."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        encoded = self._tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return dict(zip(unique, encoded["input_ids"], strict=True))

    def continuations(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of each text as it goes on after another one."""
        if not self._adds_blank:
            return self.many(texts)
        return {text: self._after_anchor(text) for text in dict.fromkeys(texts)}

    def _after_anchor(self, text: str) -> list[int]:
        for anchor in ("\n", "a", "."):
            ids = self.many([anchor, anchor + text])
            head, whole = ids[anchor], ids[anchor + text]
            if whole[: len(head)] == head:
                return whole[len(head) :]
        raise DataError(f"this tokenizer cannot continue a text with {text[:40]!r}: give the row as a conversation")


class _Draft(NamedTuple):
    """Ids of one example before any limit, and what was noted on the way."""

    prompt: list[int]
    answers: list[Tokens]
    notes: list[str]


class _RowMaker:
    """Turns chunks of examples into token rows and keeps the report."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: TokenSettings,
        columns: tuple[str, ...],
        report: TokenReport,
    ) -> None:
        self._settings = settings
        self._columns = tuple(name for name in columns if name != TARGET)
        self._targets = TARGET in columns
        self._report = report
        self._encoder = TextEncoder(tokenizer)
        self._renderer = ChatRenderer(tokenizer, settings.chat_template_kwargs)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        self._vocabulary = len(tokenizer)

    def rows(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token rows of a chunk, without those that are left out."""
        texts = [example for example in examples if isinstance(example.prompt, str)]
        chats = [example for example in examples if not isinstance(example.prompt, str)]
        drafts = self._text_drafts(texts) | self._chat_drafts(chats)
        rows = (self._row(example, drafts[id(example)]) for example in examples)
        return [row for row in rows if row is not None]

    def _answers(self, example: Example) -> dict[str, Any]:
        """The answers of an example by column name."""
        if not example.paired:
            return {"completion": example.completion}
        pair = {"chosen": example.chosen, "rejected": example.rejected}
        return {**pair, TARGET: target_of(example)} if self._targets else pair

    # Examples to drafts

    def _text_drafts(self, examples: Sequence[Example]) -> dict[int, _Draft]:
        prompts = self._encoder.many(str(example.prompt) for example in examples)
        texts = self._encoder.continuations(text for example in examples for text in self._answers(example).values())
        drafts = {}
        for example in examples:
            prompt = [*self._encoder.prefix, *prompts[str(example.prompt)]]
            if not prompt and self._bos is not None:
                prompt = [self._bos]
            answers = [self._ended(example, texts[text]) for text in self._answers(example).values()]
            drafts[id(example)] = _Draft(prompt, [(ids, [True] * len(ids)) for ids in answers], [])
        return drafts

    def _chat_drafts(self, examples: Sequence[Example]) -> dict[int, _Draft]:
        rendered = {id(example): self._renderer.row(example, self._answers(example)) for example in examples}
        ids = self._encoder.many(text for row in rendered.values() for text in border_texts(row))
        return {id(example): self._chat_draft(example, rendered[id(example)], ids) for example in examples}

    def _chat_draft(self, example: Example, row: RenderedRow, ids: Mapping[str, list[int]]) -> _Draft:
        prompt, notes = ids[row.prompt], []
        laid_out = [joint_tokens(row.prompt, answer.pieces, ids) for answer in row.answers]
        if None in laid_out or any(answer.before != row.prompt for answer in row.answers):
            notes.append("prompt_not_prefix")
        if notes and self._settings.prompt_boundary == "common_prefix":
            prompt, answers = common_prefix_tokens(row, ids)
        else:
            pairs = zip(laid_out, row.answers, strict=True)
            answers = [self._piecewise(answer.pieces) if found is None else found for found, answer in pairs]
        for index, (tokens, flags) in enumerate(answers):
            if not row.answers[index].closed:
                ended = self._ended(example, tokens)
                answers[index] = (ended, flags + [True] * (len(ended) - len(tokens)))
                notes.append("eos_appended")
        return _Draft(prompt, answers, notes)

    def _piecewise(self, pieces: Sequence[Piece]) -> Tokens:
        """Ids of an answer whose tokens merge over a border: each piece by itself."""
        ids = self._encoder.continuations(piece.text for piece in pieces)
        flags = [piece.scored for piece in pieces for _ in ids[piece.text]]
        return [token for piece in pieces for token in ids[piece.text]], flags

    def _ended(self, example: Example, ids: list[int]) -> list[int]:
        """The ids with exactly one end-of-sequence token at their end."""
        if self._eos is None:
            raise UserError(
                f"{example.where}: the answer needs an end-of-sequence token and the tokenizer has none. "
                "Set `tokenizer.eos_token`"
            )
        return ids if ids and ids[-1] == self._eos else [*ids, self._eos]

    # Drafts to rows

    def _row(self, example: Example, draft: _Draft) -> dict[str, Any] | None:
        self._refuse_two_bos(example, draft.prompt)
        prompt = self._array(example, draft.prompt)
        answers = tuple(Answer(self._array(example, ids), np.array(flags, dtype=bool)) for ids, flags in draft.answers)
        if not len(prompt):
            for answer in answers:
                answer.scored[:1] = False  # no hidden state predicts the first token
        if len(answers) > 1 and np.array_equal(answers[0].ids, answers[1].ids):
            self._leave_out_identical(example)
            return None
        fitted = fit(prompt, answers, self._settings, bos_token_id=self._bos)
        if fitted.reason is not None:
            lengths = " and ".join(str(len(answer.ids)) for answer in answers)
            self._report.drop(
                fitted.reason,
                f"{example.where} (prompt {len(prompt)} tokens, {lengths} after it; limit {self._settings.max_length})",
            )
            return None
        for note in dict.fromkeys([*draft.notes, *_cuts(fitted)]):
            self._report.note(note, str(example.where))
        return self._token_row(example, fitted)

    def _token_row(self, example: Example, fitted: Fitted) -> dict[str, Any]:
        row: dict[str, Any] = {
            "example_id": example.example_id,
            "row": example.where.row,
            "prompt_ids": fitted.prompt,
        }
        for part, answer in zip(self._answers(example), fitted.answers, strict=True):
            row[f"{part}_ids"], row[f"{part}_scored"] = answer
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

    def _refuse_two_bos(self, example: Example, prompt: list[int]) -> None:
        if self._bos is not None and prompt[:2] == [self._bos, self._bos]:
            cause = (
                "the text begins with it and the tokenizer adds another. Remove it from the text"
                if isinstance(example.prompt, str)
                else "the chat template writes it twice, or a message begins with it. Remove one of the two"
            )
            raise DataError(f"{example.where}, prompt: two beginning-of-sequence tokens in a row: {cause}")

    def _array(self, example: Example, ids: list[int]) -> Ids:
        # A special token that the tokenizer lacks shows as None.
        array = np.array([-1] if None in ids else ids, dtype=np.int32)
        if array.size and not 0 <= array.min() <= array.max() < self._vocabulary:
            raise UserError(
                f"{example.where}: the tokenizer gave an id outside its vocabulary of {self._vocabulary} entries. "
                "Check that its special tokens are part of the vocabulary"
            )
        return array


def _declared_columns(
    examples: Sequence[Example], required: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[str, ...]:
    problems = check_columns(examples, required, optional)
    if problems:
        more = f" ({len(problems) - 1} more rows like it)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")
    return (*required, *(name for name in optional if examples[0].columns.get(name) is not None))


def _cuts(fitted: Fitted) -> list[str]:
    """What the length limit did to a row that is kept."""
    notes = ["prompt_cut"] if fitted.prompt_cut else []
    if any(fitted.cut):
        notes.append("eos_cut")
    pair = fitted.cut[:2]
    if any(pair) and not all(pair):
        notes.append("eos_cut_one_sided")
    return notes
