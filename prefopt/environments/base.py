"""What an environment is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Episode(Protocol):
    """One try at a task. It begins after the messages of the task's `prompt`, with the agent's turn."""

    def step(self, text: str) -> str | Mapping[str, Any] | None:
        """What answers the agent's turn `text`: what a user says, or a message with `role` and `content`.

        None: the episode is over. The same turns should have the same answers: what is random follows from the task.
        """

    @property
    def reward(self) -> float:
        """What the agent has earned so far, a finite number; read once, at the end."""


Environment = Callable[[Mapping[str, Any]], Episode]
"""Begins an episode of a task: a row of the data without its expert's turns, so `prompt` and all other columns."""
