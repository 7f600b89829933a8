"""Conversations as text and ids: the prompt as the model meets it at generation time, each answer cut into pieces.

A template is a program: it may add a system message, rewrite earlier turns or leave thoughts out. So no message is ever
rendered by itself. A border is found by rendering the conversation up to it, or with a marked word in the place of one
message, and is believed only if what comes before it is, letter for letter, the start of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from prefopt.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.formats import Example
    from prefopt.data.messages import Message
    from prefopt.data.problems import Where

Tokens = tuple[list[int], list[bool]]  # ids of an answer and, for each, whether it is scored

# Stands in for a message's content, to see what a template puts around it. No white space and no tag in it: templates
# trim the one and split at the other.
_PROBE = "PROBE7f3a9c51"


class Piece(NamedTuple):
    """A stretch of an answer's text; `scored` where the assistant wrote it, its end marker included."""

    text: str
    scored: bool


class RenderedAnswer(NamedTuple):
    """One answer as text.

    `before` is what the whole conversation holds before the answer: the prompt, unless the template writes the prompt
    in another way once an answer follows. `pieces` run up to the last end marker; white space after it is left out.
    `closed` tells whether the template itself marks the end of the last turn. Of an unfinished answer they run up to
    the end of its content, and it counts as closed: nothing is to be added.
    """

    before: str
    pieces: tuple[Piece, ...]
    closed: bool


class RenderedRow(NamedTuple):
    """A prompt as rendered for generation, and its answers."""

    prompt: str
    answers: tuple[RenderedAnswer, ...]


def require_template(tokenizer: PreTrainedTokenizerBase, where: Where) -> None:
    """Raises `UserError` if the tokenizer cannot render conversations; `where` is the first row that is one."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: this row is a conversation, but the tokenizer has no chat template. Use the tokenizer of an "
            "instruction-tuned model, set `tokenizer.chat_template`, or give prompt and answers as plain text"
        )


class ChatRenderer:
    """Renders conversations with a tokenizer's template; `kwargs` go to the template, and a row's own override them.

    Examples keep the rules of their format: an answer begins and ends with an assistant turn, the prompt does not end
    with one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self._markers: set[str] = set()  # end markers this template was seen to write

    def row(self, example: Example, answers: Mapping[str, list[Message]]) -> RenderedRow:
        """The prompt of `example` and the named answers, such as `{"chosen": messages, "rejected": messages}`.

        Raises:
            DataError: the template refuses a conversation, or rewrites it so that no border can be trusted.
        """
        prompt = self.text(example, "prompt", list(example.prompt), generation_prompt=True)
        conversations = [_Conversation(self, example, part, answer) for part, answer in answers.items()]
        return RenderedRow(prompt, tuple(self._answer(conversation, prompt) for conversation in conversations))

    def text(self, example: Example, part: str, messages: list[Any], *, generation_prompt: bool = False) -> str:
        """A conversation as text, for the column `part` of an example."""
        arguments = {**self._kwargs, **(example.chat_template_kwargs or {})}
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=example.tools, tokenize=False, add_generation_prompt=generation_prompt, **arguments
            )
        except Exception as error:  # a template is foreign code and may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"{example.where}, {part}: the chat template fails on the turns {roles}: {type(error).__name__}: "
                f"{error}. Bring the messages into the form this model's template expects, or leave the row out"
            ) from error
        return str(text)

    def _answer(self, conversation: _Conversation, prompt: str) -> RenderedAnswer:
        whole = conversation.text(len(conversation.answer))
        spans = []
        for turn, message in enumerate(conversation.answer):
            if message["role"] == "assistant":
                opening = conversation.text(turn, generation_prompt=True) if turn else prompt
                spans.append((conversation.start(whole, turn, opening), conversation.end(whole, turn)))
        if conversation.unfinished:
            spans[-1] = (spans[-1][0], conversation.content_end(whole))
        for start, end in spans:
            if start >= end:
                raise conversation.error("the chat template writes nothing for an assistant turn; is it empty?")
        closed = conversation.unfinished or self._closed(conversation, whole)
        return RenderedAnswer(whole[: spans[0][0]], tuple(_pieces(whole, spans)), closed)

    def _closed(self, conversation: _Conversation, whole: str) -> bool:
        last = len(conversation.answer) - 1
        said = (conversation.answer[last].get("content") or "").rstrip()
        # Not where the message itself ends with it: what came before must not decide on this row.
        if any(whole.rstrip().endswith(marker) and not said.endswith(marker) for marker in self._markers):
            return True
        around = conversation.around(last + 1, last, {"role": "assistant"})
        if around is None:
            return True
        marker = around[1].strip()
        if marker:
            self._markers.add(marker)
        return bool(marker)


@dataclass(frozen=True)
class _Conversation:
    """A prompt and one answer to it: where the assistant turns of the answer begin and end in the text."""

    renderer: ChatRenderer
    example: Example
    part: str
    answer: list[Message]

    @property
    def unfinished(self) -> bool:
        """Whether the answer was cut off."""
        return self.part in self.example.unfinished

    def text(self, stop: int, *, generation_prompt: bool = False) -> str:
        """The prompt and the first `stop` messages of the answer."""
        messages = [*self.example.prompt, *self.answer[:stop]]
        return self.renderer.text(self.example, self.part, messages, generation_prompt=generation_prompt)

    def around(self, stop: int, turn: int, message: Message) -> tuple[str, str] | None:
        """What `text(stop)` holds before and after the content of one turn; None unless that shows exactly once."""
        probe = {**message, "content": _PROBE}
        messages = [*self.example.prompt, *self.answer[:turn], probe, *self.answer[turn + 1 : stop]]
        parts = self.renderer.text(self.example, self.part, messages).split(_PROBE)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def start(self, whole: str, turn: int, opening: str) -> int:
        """Where a turn begins in the whole text. `opening` is the text up to it, as rendered for generation."""
        if whole.startswith(opening):
            return len(opening)
        around = self.around(len(self.answer), turn, {"role": "assistant"})
        if around is None or not whole.startswith(around[0]):
            raise self._untrusted("begins")
        return len(around[0])

    def end(self, whole: str, turn: int) -> int:
        """Where a turn ends in the whole text, its end marker included and the white space after that left out."""
        stop = turn + 1
        if stop == len(self.answer):
            return len(whole.rstrip())
        so_far = self.text(stop).rstrip()
        if whole.startswith(so_far):
            return len(so_far)
        # The turn is written in another way once more turns follow; what comes after its content still holds.
        message = self.answer[turn]
        inside, last = self.around(len(self.answer), turn, message), self.around(stop, turn, message)
        if inside is None or last is None:
            raise self._untrusted("ends")
        after, marker = inside[1], last[1].rstrip()
        if not whole.endswith(after) or not after.startswith(marker):
            raise self._untrusted("ends")
        return len(whole) - len(after) + len(marker)

    def content_end(self, whole: str) -> int:
        """Where the content of the last turn ends in the whole text, what the template writes after it left out."""
        last = len(self.answer) - 1
        around = self.around(last + 1, last, self.answer[last])
        if around is None or not whole.endswith(around[1]):
            raise self._untrusted("ends")
        return len(whole) - len(around[1])

    def error(self, problem: str) -> DataError:
        """An error about this answer."""
        return DataError(f"{self.example.where}, {self.part}: {problem}")

    def _untrusted(self, verb: str) -> DataError:
        return self.error(
            f"cannot tell where an assistant turn {verb}, because the chat template rewrites the conversation. Give "
            "each assistant turn as the answer of a row of its own, or use a template that keeps turns as they are"
        )


def _pieces(whole: str, spans: Iterable[tuple[int, int]]) -> Iterable[Piece]:
    """The text from the first scored span to the end of the last, cut at the borders of the spans."""
    position: int | None = None
    for start, end in spans:
        if position is not None and start > position:
            yield Piece(whole[position:start], scored=False)
        yield Piece(whole[start:end], scored=True)
        position = end


# Borders of rendered conversations, in tokens


def border_texts(row: RenderedRow) -> Iterable[str]:
    """Every text whose ids tell where a piece begins or ends."""
    yield row.prompt
    for answer in row.answers:
        for before in {row.prompt, answer.before}:
            yield from _cumulative(before, answer.pieces)


def _cumulative(before: str, pieces: Sequence[Piece]) -> Iterable[str]:
    return accumulate((piece.text for piece in pieces), initial=before)


def joint_tokens(prompt: str, pieces: Sequence[Piece], ids: Mapping[str, list[int]]) -> Tokens | None:
    """Ids after the prompt, tokenised with it as one text; None if a token reaches over the border of a piece."""
    starts = [ids[text] for text in _cumulative(prompt, pieces)]
    whole = starts[-1]
    if any(whole[: len(start)] != start for start in starts):
        return None
    borders = [len(start) for start in starts]
    return whole[borders[0] :], _flags(pieces, borders)


def common_prefix_tokens(row: RenderedRow, ids: Mapping[str, list[int]]) -> tuple[list[int], list[Tokens]]:
    """Prompt ids cut to what the whole conversations begin with, and what follows them there.

    Everything after the cut counts as the answer, so a token that reaches over the border, or what is left of the
    prompt's end, is scored in both answers or in none.
    """
    prompt, wholes, borders = ids[row.prompt], [], []
    for answer in row.answers:
        starts = [ids[text] for text in _cumulative(answer.before, answer.pieces)]
        wholes.append(starts[-1])
        borders.append(list(accumulate((_shared(start, starts[-1]) for start in starts), max)))
    cut = min(min(_shared(prompt, whole), ends[0]) for whole, ends in zip(wholes, borders, strict=True))
    laid_out = zip(row.answers, wholes, borders, strict=True)
    return prompt[:cut], [(whole[cut:], _flags(answer.pieces, [cut, *ends[1:]])) for answer, whole, ends in laid_out]


def _flags(pieces: Sequence[Piece], borders: Sequence[int]) -> list[bool]:
    spans = zip(pieces, pairwise(borders), strict=True)
    return [piece.scored for piece, (start, stop) in spans for _ in range(start, stop)]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    same = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(same, min(len(first), len(second)))
