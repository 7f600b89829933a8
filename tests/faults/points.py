"""Every file operation of a part of a run as a numbered point, at which a job can be killed or find the disk full.

An audit hook hears of each file that is opened, renamed, removed or made before it happens. `os.fsync` and the two
writers that open their files in native code are wrapped. What writing does between two points is played by cutting the
file that the last one opened.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from tests.faults.reports import Reports

_WRITING = os.O_WRONLY | os.O_RDWR
_MAKING = ("open", "os.mkdir")
_PLACED = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0}  # which argument is the path
_FREE = 4096


@dataclass(frozen=True)
class Spec:
    """Which operations count, and what happens at number `number` of them, the first being 0.

    Counted are those inside `folder` from the event `begin` to the event `end` (event and step; None: to the exit);
    the first event of all is `run`.
    `harm` is None (each operation is reported), `kill`, `pause` (SIGSTOP, and the report `paused` before it), or `full`
    (nothing can be written from there on). With `cut`, the file that was being written just before loses all but that
    share of what was new in it.
    """

    folder: str
    begin: tuple[str, int]
    end: tuple[str, int] | None = None
    harm: str | None = None
    number: int = 0
    cut: float | None = None


def watch(spec: Spec, reports: Reports) -> None:
    """Set the points of this process; there is no way back."""
    points = _Points(spec, reports)
    reports.listeners.append(points.hear)
    sys.addaudithook(points.audit)
    points.wrap_sync()
    points.wrap_native_writers()
    if spec.harm == "full":
        points.wrap_open()
        points.wrap_disk_usage()


class _Points:
    def __init__(self, spec: Spec, reports: Reports) -> None:
        self.spec = spec
        self.reports = reports
        self.counting = False
        self.count = 0
        self.being_written: tuple[str, int] | None = None  # the file opened last, and its length before
        self.in_python_open = False
        self.is_full = False

    def hear(self, event: str, step: int) -> None:
        """Count from the begin event on, and up to the end event, which is a point itself."""
        if self.counting and self.spec.end is not None and (event, step) == tuple(self.spec.end):
            self.at("done", self.spec.folder)
            self.counting = False
        if (event, step) == tuple(self.spec.begin):
            self.counting = True

    def at(self, operation: str, path: str) -> bool:
        """A point: report it, or do the harm that is due. Whether the disk is full for this operation."""
        if not self.counting or not path.startswith(self.spec.folder):
            return False
        number, written = self.count, self.being_written
        self.count, self.being_written = number + 1, None
        name = f"{operation} {os.path.relpath(path, self.spec.folder)}"
        if self.spec.harm is None:
            self.counting = False  # sending is no operation of the run
            self.reports.send("operation", name=name, cuts=written is not None)
            self.counting = True
        elif self.spec.harm == "kill" and number == self.spec.number:
            if self.spec.cut is not None and written is not None:
                _cut(*written, self.spec.cut)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.spec.harm == "pause" and number == self.spec.number:
            self.reports.send("paused")
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.spec.harm == "full" and number >= self.spec.number:
            self.is_full = True
            return operation in _MAKING or (operation == "sync" and number == self.spec.number)
        return False

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hear of an operation before Python does it."""
        if not self.counting:
            return
        if event == "open":
            path, _, flags = args
            if flags & _WRITING and isinstance(path, str | bytes):
                self._opened(os.path.abspath(os.fsdecode(path)), flags)
        elif event in _PLACED:
            path = _resolved(args[_PLACED[event]], args[-1])
            is_made_already = event == "os.mkdir" and os.path.exists(path)
            if not is_made_already and self.at(event, path):
                raise _no_space()

    def _opened(self, path: str, flags: int) -> None:
        if not path.startswith(self.spec.folder):
            return
        full = self.at("open", path)
        before = 0 if flags & os.O_TRUNC or not os.path.exists(path) else os.path.getsize(path)
        self.being_written = path, before
        if full and not self.in_python_open:
            raise _no_space()

    def wrap_sync(self) -> None:
        stock = os.fsync

        def fsync(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            if self.at("sync", os.readlink(f"/proc/self/fd/{number}")):
                raise _no_space()
            stock(fd)

        os.fsync = fsync

    def wrap_native_writers(self) -> None:
        safetensors.torch.serialize_file = self._native(
            safetensors.torch.serialize_file,
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        )
        torch.save = self._native(
            torch.save, RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4096 vs 3990")
        )

    def _native(self, stock: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def write(content: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, str | os.PathLike):
                return stock(content, file, *args, **kwargs)
            path = os.path.abspath(os.fspath(file))
            if not self.counting or not path.startswith(self.spec.folder):
                return stock(content, file, *args, **kwargs)
            full = self.at("open", path)
            counting, self.counting = self.counting, False
            result = stock(content, file, *args, **kwargs)
            self.counting = counting
            self.being_written = path, 0
            if full:
                _cut(path, 0, 0.5)
                raise error
            return result

        return write

    def wrap_open(self) -> None:
        """On a full disk a file can still be made; it is the writing that fails, at the latest when it is closed."""
        stock = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            count, self.in_python_open = self.count, True
            try:
                handle = stock(file, mode, *args, **kwargs)
            finally:
                self.in_python_open = False
            if self.count == count or not self.is_full:
                return handle
            handle.close()
            return stock("/dev/full", mode.replace("x", "w"), *args, **kwargs)

        builtins.open = io.open = opened

    def wrap_disk_usage(self) -> None:
        stock = shutil.disk_usage

        def disk_usage(path: Any) -> Any:
            usage = stock(path)
            return usage._replace(free=_FREE) if self.is_full else usage

        shutil.disk_usage = disk_usage


def _resolved(path: Any, folder: int) -> str:
    """The whole path of an operation that may be relative to an open folder."""
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.normpath(os.path.join(base, os.fsdecode(path)))


def _cut(path: str, before: int, share: float) -> None:
    if Path(path).exists():
        new = os.path.getsize(path) - before
        os.truncate(path, before + int(new * share))


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
