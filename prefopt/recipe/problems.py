"""Where a setting was written, and the list of everything that is wrong with a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefopt.errors import RecipeError

MAX_SHOWN = 50
TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,})")


def redact(text: str) -> str:
    """`text` without anything that looks like an access token."""
    return TOKEN.sub("<token>", text)


@dataclass(frozen=True)
class Place:
    """A line of a recipe file, or an option of the command line (then `source` is `--name` and `line` is None)."""

    source: str
    line: int | None = None

    @property
    def on_command_line(self) -> bool:
        """Whether the setting came from an option."""
        return self.source.startswith("--")

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Problems:
    """Collects what is wrong, so that one reading of a recipe reports all of it."""

    def __init__(self) -> None:
        self._found: list[tuple[bool, int, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: Place, name: str, reason: str) -> None:
        """Note that the setting `name`, written at `place`, is refused; `reason` says why and what to do."""
        once = place.source in (name, f"--{name}")
        text = f"{place}: {reason}" if once else f"{place}: {name}: {reason}"
        self._found.append((place.on_command_line, place.line or 0, redact(text)))

    def refuse(self) -> None:
        """Raise `RecipeError` with one line for each problem, in the order of the file; nothing when there is none."""
        if not self._found:
            return
        lines = [text for *_, text in sorted(self._found, key=lambda found: found[:2])]
        rest = [f"... and {len(lines) - MAX_SHOWN} more."] if len(lines) > MAX_SHOWN else []
        raise RecipeError("\n".join(lines[:MAX_SHOWN] + rest))
