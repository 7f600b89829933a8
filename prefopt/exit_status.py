"""The exit status of a launched process, for a parent on the other side of a launcher, which gives its own instead."""

from __future__ import annotations

import os
from contextlib import suppress

STATUS_FILE = "PREFOPT_STATUS_FILE"
"""Names, in the environment, the file that a process which fails leaves its status in."""


def leave_status(status: int) -> None:
    """Leave a status where a parent asked for it; of several processes the one that fails first is heard."""
    file = os.environ.get(STATUS_FILE)
    if file and status:
        with suppress(OSError), open(file, "x", encoding="ascii") as answer:
            answer.write(str(status))
