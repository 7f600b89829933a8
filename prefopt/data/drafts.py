"""Examples -> drafts: the ids of prompt and answers and which of them are scored, before any limit on their length.

A draft depends on its example, the tokenizer and `DraftSettings`, and on nothing else: not on other examples, nor on
the order they come in. So drafts may be made in any process, and kept from one run to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prefopt.data.answers import TARGET
from prefopt.data.columns import target_of
from prefopt.data.templates import (
    ChatRenderer,
    Piece,
    RenderedRow,
    Tokens,
    border_texts,
    common_prefix_tokens,
    joint_tokens,
)
from prefopt.data.truncation import Answer, Ids
from prefopt.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.formats import Example

PROMPT_NOT_PREFIX = "prompt_not_prefix"
EOS_APPENDED = "eos_appended"
_NOTES = (PROMPT_NOT_PREFIX, EOS_APPENDED)


@dataclass(frozen=True)
class DraftSettings:
    """What decides the ids of a draft beside the tokenizer; the fields are those of `TokenSettings`.

    `targets`: whether an example's `target` is an answer beside the two of the pair.
    """

    prompt_boundary: str = "generation_prompt"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: bool = False


class Draft(NamedTuple):
    """Ids of one example, its answers in the order of `parts_of`, and what was noted on the way."""

    prompt: Ids
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]

    def pack(self) -> Ids:
        """The draft as one array: notes, count of answers, all lengths, all ids; `~id` where a token is not scored."""
        notes = sum(1 << bit for bit, note in enumerate(_NOTES) if note in self.notes)
        lengths = [len(self.prompt), *(len(answer.ids) for answer in self.answers)]
        answers = [np.where(scored, ids, ~ids) for ids, scored in self.answers]
        return np.concatenate([np.array([notes, len(answers), *lengths], dtype=np.int32), self.prompt, *answers])

    @classmethod
    def unpack(cls, packed: Ids) -> Draft:
        """The draft that `pack` made this array of. Its arrays are copies."""
        notes, count = packed[:2].tolist()
        lengths, rest = packed[2 : 3 + count], packed[3 + count :]
        prompt, *answers = np.split(rest, np.cumsum(lengths)[:-1])
        flags = [part >= 0 for part in answers]
        unpacked = (Answer(np.where(scored, part, ~part), scored) for part, scored in zip(answers, flags, strict=True))
        return cls(prompt.copy(), tuple(unpacked), tuple(note for bit, note in enumerate(_NOTES) if notes >> bit & 1))


def parts_of(example: Example, targets: bool) -> dict[str, Any]:
    """The answers of an example by column name."""
    if not example.paired:
        return {"completion": example.completion}
    pair = {"chosen": example.chosen, "rejected": example.rejected}
    return {**pair, TARGET: target_of(example)} if targets else pair


def content_id(example: Example, targets: bool) -> bytes:
    """SHA-256 of everything a draft reads of its example. The order of keys counts: a template may show it."""
    said: list[Any] = [example.prompt, parts_of(example, targets), example.tools, example.chat_template_kwargs]
    said += [example.unfinished] if example.unfinished else []
    text = json.dumps(said, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


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


class Drafter:
    """Makes drafts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DraftSettings) -> None:
        self.settings = settings
        self._encoder = TextEncoder(tokenizer)
        self._renderer = ChatRenderer(tokenizer, settings.chat_template_kwargs)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        self._vocabulary = len(tokenizer)

    def drafts(self, examples: Sequence[Example]) -> list[Draft]:
        """Drafts of the examples, in their order. The tokenizer is called for all of them together.

        Raises `DataError` and `UserError` as `tokenize_examples` does.
        """
        texts = [example for example in examples if isinstance(example.prompt, str)]
        chats = [example for example in examples if not isinstance(example.prompt, str)]
        drafts = self._text_drafts(texts) | self._chat_drafts(chats)
        return [drafts[id(example)] for example in examples]

    def _answers(self, example: Example) -> dict[str, Any]:
        return parts_of(example, self.settings.targets)

    def _text_drafts(self, examples: Sequence[Example]) -> dict[int, Draft]:
        prompts = self._encoder.many(str(example.prompt) for example in examples)
        texts = self._encoder.continuations(text for example in examples for text in self._answers(example).values())
        drafts = {}
        for example in examples:
            prompt = [*self._encoder.prefix, *prompts[str(example.prompt)]]
            if not prompt and self._bos is not None:
                prompt = [self._bos]
            answers = (
                texts[text] if part in example.unfinished else self._ended(example, texts[text])
                for part, text in self._answers(example).items()
            )
            drafts[id(example)] = self._draft(example, prompt, ((ids, [True] * len(ids)) for ids in answers))
        return drafts

    def _chat_drafts(self, examples: Sequence[Example]) -> dict[int, Draft]:
        rendered = {id(example): self._renderer.row(example, self._answers(example)) for example in examples}
        ids = self._encoder.many(text for row in rendered.values() for text in border_texts(row))
        return {id(example): self._chat_draft(example, rendered[id(example)], ids) for example in examples}

    def _chat_draft(self, example: Example, row: RenderedRow, ids: Mapping[str, list[int]]) -> Draft:
        prompt, notes = ids[row.prompt], []
        laid_out = [joint_tokens(row.prompt, answer.pieces, ids) for answer in row.answers]
        if None in laid_out or any(answer.before != row.prompt for answer in row.answers):
            notes.append(PROMPT_NOT_PREFIX)
        if notes and self.settings.prompt_boundary == "common_prefix":
            prompt, answers = common_prefix_tokens(row, ids)
        else:
            pairs = zip(laid_out, row.answers, strict=True)
            answers = [self._piecewise(answer.pieces) if found is None else found for found, answer in pairs]
        for index, (tokens, flags) in enumerate(answers):
            if not row.answers[index].closed:
                ended = self._ended(example, tokens)
                answers[index] = (ended, flags + [True] * (len(ended) - len(tokens)))
                notes.append(EOS_APPENDED)
        return self._draft(example, prompt, answers, *dict.fromkeys(notes))

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

    def _draft(self, example: Example, prompt: list[int], answers: Iterable[Tokens], *notes: str) -> Draft:
        made = (Answer(self._array(example, ids), np.array(flags, dtype=bool)) for ids, flags in answers)
        return Draft(self._array(example, prompt), tuple(made), notes)

    def _array(self, example: Example, ids: list[int]) -> Ids:
        # A special token that the tokenizer lacks shows as None.
        array = np.array([-1] if None in ids else ids, dtype=np.int32)
        if array.size and not 0 <= array.min() <= array.max() < self._vocabulary:
            raise UserError(
                f"{example.where}: the tokenizer gave an id outside its vocabulary of {self._vocabulary} entries. "
                "Check that its special tokens are part of the vocabulary"
            )
        return array
