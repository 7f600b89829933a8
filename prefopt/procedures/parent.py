"""`prefopt run`: one `accelerate launch` for each stage of a plan, so that every stage finds the memory clean.

This process opens no model and no device. What it launches is `prefopt train --stage K`, which launches nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from prefopt.exit_status import STATUS_FILE
from prefopt.procedures.runner import progress, title
from prefopt.procedures.stage import Stage

_LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")


def run_launched(stages: Sequence[Stage], launcher: Sequence[str], training: Sequence[str]) -> int:
    """Launch what is missing of a plan, one stage after the other; 0, or the status of the first that fails.

    `launcher`: options of `accelerate launch`; `training`: recipe and options of `prefopt train`. A SIGTERM goes on to
    the processes of the stage under way, which save and end, and the status is that of a process it has ended. Raises
    `UserError` when a folder holds a stage made with other settings.
    """
    with _signals() as signals:
        for number, (stage, done) in enumerate(progress(stages), start=1):
            if done:
                print(f"{title(stages, number)}: done before, in {stage.folder}", flush=True)
                continue
            command = [*_LAUNCH, *launcher, "--module", "prefopt", "train", *training, "--stage", str(number)]
            status = _run(command, signals)
            if status:
                reason = f"{title(stages, number)}: ended with status {status}; the same command goes on from there"
                print(reason, file=sys.stderr, flush=True)
                return status
    return 0


class _Signals:
    """The signal that this process was told to end by, and the launcher that it concerns."""

    def __init__(self) -> None:
        self.told: int | None = None
        self.launcher: subprocess.Popen[bytes] | None = None

    def take(self, number: int, frame: Any) -> None:
        """Note a signal. Ctrl-C reaches every process of a terminal by itself; a SIGTERM is passed on."""
        self.told = number
        if number == signal.SIGTERM:
            self.pass_on()

    def pass_on(self) -> None:
        """Tell the processes that train, not their launcher: it would leave them behind, or kill them in mid-save."""
        if self.launcher is None:
            return
        with suppress(psutil.Error):
            launcher = psutil.Process(self.launcher.pid)
            for process in launcher.children(recursive=True) or [launcher]:
                with suppress(psutil.Error):
                    process.terminate()


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    previous = {number: signal.signal(number, signals.take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(command: Sequence[str], signals: _Signals) -> int:
    """The exit status of a launch: that of the process which failed first, where it could leave one."""
    if signals.told is not None:
        return 128 + signals.told
    with TemporaryDirectory() as folder:
        file = Path(folder) / "status"
        environment: Mapping[str, str] = {**os.environ, STATUS_FILE: str(file)}
        with subprocess.Popen(command, env=environment) as signals.launcher:
            if signals.told == signal.SIGTERM:  # it came while the launcher was being started
                signals.pass_on()
            launched = signals.launcher.wait()
        signals.launcher = None
        if signals.told is not None:
            return 128 + signals.told
        left = file.read_text() if file.is_file() else ""
    return int(left) if left and launched else _status(launched)


def _status(returned: int) -> int:
    """A child's return code as a shell gives it: 128 plus the signal that killed it."""
    return 128 - returned if returned < 0 else returned
