"""One voice per run: lines for the user, from the main process alone."""

from __future__ import annotations

import sys

from accelerate import PartialState
from tqdm.auto import tqdm


def say(*lines: str) -> None:
    """Print lines once, however many processes run, above a progress bar where one is on the screen."""
    if not PartialState().is_local_main_process:
        return
    for line in lines:
        write_line(line)
    sys.stdout.flush()


def write_line(line: str) -> None:
    """Print a line above the progress bars there are.

    tqdm clears them one by one, and fails when a bar of another thread, such as an upload's, ends meanwhile. No run
    ends for that: the line is then printed as it is.
    """
    try:
        tqdm.write(line)
    except RuntimeError:
        print(line)
