"""Who computes what an entry of the store lacks, so that several runs do not all compute the same.

A lease saves work and guards nothing: rows that two processes write at once are equally right. So it may end while its
holder, cut off from the file system, still works, and where the file system takes no lease everyone gets one.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

# Seconds without a sign of life after which a lease ends. A holder that dies on this machine is noticed at once.
LEASE_SECONDS = 60.0
# Far beyond a lease, and beyond what the clocks of two machines differ by.
_ABANDONED = 20 * LEASE_SECONDS


class Lease:
    """A file that names the process which computes. It is renewed while that lives, and ends with it.

    A file with a heartbeat, and not a lock of the operating system, which need not end when its holder hangs or when
    another machine goes down. Keep one object while you ask: it times how long a lease has not been renewed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Who computes is the process, whichever of its threads asks.
        self._file = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False)

    def take(self) -> bool:
        """Take it, without waiting; False while another living process, or this one, has it."""
        if self._file.is_locked:
            return False
        for _ in range(2):  # the first attempt may do no more than clear away what a dead process left
            try:
                self._file.acquire(blocking=False)
                return True
            except (Timeout, LeaseSettingsMismatch):
                continue
            except OSError:
                return True
        return False

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        self._file.release()

    def holder(self) -> str | None:
        """The process that has it, as `process 123 on host`."""
        owner = self._file.owner
        # What follows the name of the machine tells its containers apart.
        return None if owner is None else f"process {owner.pid} on {owner.hostname.split('?')[0]}"

    def is_held(self) -> bool:
        """Whether a living process has it, at a glance."""
        if self.take():
            self.release()
            return False
        # Nobody can ask another machine whether a process lives, but the living renew their leases.
        with suppress(FileNotFoundError):
            return time.time() - self.path.stat().st_mtime < _ABANDONED
        return False

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
