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
        tqdm.write(line)
    sys.stdout.flush()
