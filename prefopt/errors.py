"""Errors a user can act on: where it is, what is wrong, what to do. The command line prints the message alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's recipe, data or environment must change; the message says what."""


class RecipeError(UserError):
    """A recipe or a command-line override is wrong."""


class DataError(UserError):
    """A data file or one of its rows is wrong."""


class NonFiniteError(UserError):
    """A loss or a gradient became NaN or infinite; the optimizer has not moved."""


class Stopped(SystemExit):
    """A signal told the run to end, and it can go on later: ends the process with the status of that signal."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `name`, with a leading space; empty when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""
