"""One voice per run: lines for the user, from the main process alone."""

from __future__ import annotations

from accelerate import PartialState


def say(*lines: str) -> None:
    """Print lines once, however many processes run."""
    for line in lines:
        PartialState().print(line, flush=True)
