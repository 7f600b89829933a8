"""What an environment is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Episode(Protocol):
    """One try at a task. It begins after the messages of the task's `prompt`, with the agent's turn.

    It may also have `close()`, which is called once, when it has ended or the run stops: to let go of a process, say.
    """

    def step(self, text: str) -> str | Mapping[str, Any] | None:
        """What answers the agent's turn `text`: what a user says, or a message with `role` and `content`.

        None: the episode is over. The same turns should have the same answers: what is random follows from the task.
        """

    @property
    def reward(self) -> float:
        """What the agent has earned so far, a finite number; read once, at the end."""


Environment = Callable[[Mapping[str, Any]], Episode]
"""Begins an episode of a task: a row of the data without its expert's turns and what is said of them (`label`,
`unfinished`), so `prompt`, `tools` and `chat_template_kwargs` where the row has them, and all other columns."""
