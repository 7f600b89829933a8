"""Episodes of a model in an environment, all of them one turn at a time, so that their turns are sampled in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.formats import Example
from prefopt.data.messages import Message, check_messages, is_answer
from prefopt.data.problems import Flaw, shown
from prefopt.environments.base import Environment, Episode
from prefopt.errors import UserError
from prefopt.generation import Generation, Sampling, encode_prompts
from prefopt.generation.sampling import Draw, draw_seed, sample

OVER, TURN_LIMIT, CUT_OFF, NO_TEXT, NO_ROOM = "over", "turn_limit", "cut_off", "no_text", "no_room"
WHOLE = (OVER, TURN_LIMIT)
"""Ends of an episode whose every turn the agent has finished; the others end before a turn that no data may hold."""

ANSWERS = ("user", "tool", "system", "developer")


@dataclass
class Played:
    """An episode of a task: the `messages` after its prompt, why it ended, and what it earned.

    `ended` is `over` where the environment said so, `turn_limit` after as many turns as are allowed, and otherwise the
    reason why there is no next turn: it was `cut_off`, held `no_text`, or the history left `no_room` for it.
    """

    task: Example
    number: int
    messages: list[Message] = field(default_factory=list)
    ended: str = ""
    reward: float = 0.0

    @property
    def turns(self) -> int:
        """How many turns the agent has had."""
        return sum(message["role"] == "assistant" for message in self.messages)


def play(
    environment: Environment,
    tasks: Mapping[int, Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    max_turns: int,
    batch_size: int,
    name: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Played]:
    """An episode of each of the tasks, which have numbers of their own; `name` is the environment's, for messages.

    At most `batch_size` episodes are under way at a time. What is sampled follows from the seed, the task's number and
    what was said so far, whoever plays the other tasks. Raises `UserError` with the task, for an environment that
    raises or answers with something else than a message.
    """
    room = room_of(model.config, sampling.max_new_tokens)
    played = [Played(task, number) for number, task in tasks.items()]
    waiting = iter(played)
    under_way: list[_Course] = []
    try:
        while True:
            for begun in islice(waiting, batch_size - len(under_way)):
                under_way.append(_Course(name, environment, begun))
            if not under_way:
                return played
            asked = [course.history for course in under_way]
            encoded = encode_prompts(tokenizer, asked, chat_template_kwargs)
            turns = {place: ids for place, ids in enumerate(encoded) if len(ids) <= room}
            draws = [
                Draw(place, ids, draw_seed(sampling.seed, under_way[place].played.number, ids))
                for place, ids in turns.items()
            ]
            said = dict(zip(turns, sample(model, tokenizer, draws, sampling, batch_size=batch_size), strict=True))
            for place, course in enumerate(under_way):
                course.go_on(said.get(place), max_turns)
            under_way = [course for course in under_way if not course.played.ended]
    finally:
        for course in under_way:
            with suppress(UserError):  # what stopped the run is told instead
                course.close()


class _Course:
    """An episode under way, with the task in the message of whatever its environment raises."""

    def __init__(self, name: str, environment: Environment, played: Played) -> None:
        self.played, self.task, self._name, self._closed = played, played.task, name, False
        self._episode: Episode = self._asked("beginning", lambda: environment(_row(played.task)))
        if not callable(getattr(self._episode, "step", None)):
            raise self._wrong(f"gives {type(self._episode).__name__}, which has no `step`")

    @property
    def history(self) -> Example:
        """What the agent answers next: the task's prompt, and all that was said since."""
        return replace(self.task, prompt=[*self.task.prompt, *self.played.messages])

    def close(self) -> None:
        """Let the episode let go of what it holds, once, where it has a way to."""
        close = getattr(self._episode, "close", None)
        if callable(close) and not self._closed:
            self._closed = True
            self._asked("close", close)

    def go_on(self, answer: Generation | None, max_turns: int) -> None:
        """The agent's next turn, and what the environment answers; None where there was no room for a turn."""
        if answer is None:
            self.played.ended = NO_ROOM
        elif not answer.finished:
            self.played.ended = CUT_OFF
        elif not is_answer(answer.text):
            self.played.ended = NO_TEXT
        else:
            self._speak(answer.text, max_turns)
        if self.played.ended:
            self.played.reward = self._reward()
            self.close()

    def _speak(self, text: str, max_turns: int) -> None:
        self.played.messages.append({"role": "assistant", "content": text})
        turn = self.played.turns
        heard = self._heard(turn, self._asked(f"turn {turn}", lambda: self._episode.step(text)))
        if heard is None:
            self.played.ended = OVER
        elif turn >= max_turns:
            self.played.ended = TURN_LIMIT
        else:
            self.played.messages.append(heard)

    def _heard(self, turn: int, answer: Any) -> Message | None:
        if answer is None:
            return None
        message = {"role": "user", "content": answer} if isinstance(answer, str) else answer
        try:
            (message,) = check_messages("step", [message])
        except Flaw as flaw:
            raise self._wrong(f"turn {turn}: step gives {shown(answer)}: {flaw.message}") from None
        if message["role"] not in ANSWERS:
            raise self._wrong(f"turn {turn}: step speaks as the {message['role']}")
        return message

    def _reward(self) -> float:
        reward = self._asked("reward", lambda: float(self._episode.reward))
        if not math.isfinite(reward):
            raise self._wrong(f"the reward is {reward}; it must be a number")
        return reward

    def _asked(self, when: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:  # foreign code may raise anything
            raise self._wrong(f"{when}: {type(error).__name__}: {error}") from error

    def _wrong(self, said: str) -> UserError:
        return UserError(f"environment {self._name}, task {self.task.where}: {said}")


def _row(task: Example) -> dict[str, Any]:
    """What an environment is told of a task, its own to change."""
    return deepcopy({**task.columns, **task.beside_messages, "prompt": task.prompt})


def room_of(config: PreTrainedConfig, max_new_tokens: int) -> float:
    """The most tokens a history may have for a model of this configuration to take another turn.

    Raises `UserError` for turns that leave no room for any history.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_new_tokens >= positions:
        raise UserError(
            f"max_new_tokens: a turn of {max_new_tokens} tokens leaves no room for the task within the model's "
            f"{positions} positions. Lower max_new_tokens"
        )
    return math.inf if positions is None else positions - max_new_tokens
