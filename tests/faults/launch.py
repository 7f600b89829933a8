"""Starts jobs on the fork server, on one rank or on two as torchrun would, and kills them."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.faults.points import Spec

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # a job that takes longer hangs

# One thread at every fork, and no network.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Server:
    """The fork server as its client sees it."""

    def __init__(self, jobs: socket.socket) -> None:
        self._jobs = jobs

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        ranks: int = 1,
        points: Spec | None = None,
        constants: dict[str, float] | None = None,
    ) -> Launch:
        """Start `prefopt ARGUMENTS` in `folder` on so many ranks.

        `points` are those of the first. `constants` are given other values, by their full names: waits that are right
        for long runs are long for short ones.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        places = [_place(rank, ranks, store.port) if store else {} for rank in range(ranks)]
        number = random.randrange(10**12)
        jobs = [
            self._fork(
                {
                    "arguments": list(arguments),
                    "folder": str(folder),
                    "log": str(folder / f"log-{number}-{rank}.txt"),
                    "environment": {"PREFOPT_STORE": str(folder / "store"), **place},
                    "constants": constants or {},
                    "points": asdict(points) if points and rank == 0 else None,
                    "seconds": SECONDS,
                }
            )
            for rank, place in enumerate(places)
        ]
        return Launch(jobs, store)

    def _fork(self, job: dict[str, Any]) -> Job:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._jobs, [json.dumps(job).encode()], [theirs.fileno()])
        return Job(ours, Path(job["log"]))


@contextmanager
def fork_server() -> Iterator[Server]:
    """A server that ends with the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.faults.server", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **_ENVIRONMENT}, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        yield Server(ours)
    finally:
        ours.close()
        process.wait(timeout=30)


class Job:
    """One process: what it reported so far, and the way to end it."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self.connection = connection
        self.log = log
        self.events: list[dict[str, Any]] = []
        self.ended = False
        self._rest = b""

    def wait_for(self, event: str, step: int | None = None) -> dict[str, Any] | None:
        """The first report of an event (at `step`, or at any); None when the process ended without it."""
        seen = 0
        while True:
            for found in self.events[seen:]:
                if found["event"] == event and step in (None, found["step"]):
                    return found
            seen = len(self.events)
            if self.ended:
                return None
            _read_any([self], SECONDS)

    def wait_for_text(self, text: str) -> None:
        """Wait until it has printed something."""
        end = time.monotonic() + SECONDS
        while text not in self.said and time.monotonic() < end:
            time.sleep(0.02)
        assert text in self.said, self.said[-3000:]

    def end(self) -> int | None:
        """Wait for its end; the exit status, or None when it was killed."""
        self.wait_for("never")
        return self.status

    @property
    def status(self) -> int | None:
        """The exit status, or None when it was killed."""
        return next((event["status"] for event in self.events if event["event"] == "exit"), None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        started = self.wait_for("start")
        if started is not None and not self.ended:
            with suppress(ProcessLookupError):
                os.kill(started["pid"], number)

    @property
    def said(self) -> str:
        """All that it printed."""
        return self.log.read_text() if self.log.exists() else ""

    def read(self) -> None:
        """Take in what it reported; call it when something has come."""
        received = self.connection.recv(1 << 16)
        self.ended = not received
        if self.ended:
            self.connection.close()
        *lines, self._rest = (self._rest + received).split(b"\n")
        self.events += [json.loads(line) for line in lines]


class Launch:
    """The processes of one command."""

    def __init__(self, jobs: list[Job], store: Any) -> None:
        self.jobs = jobs
        self._store = store  # lives as long as its clients

    @property
    def first(self) -> Job:
        """The main process."""
        return self.jobs[0]

    @property
    def said(self) -> str:
        """All that its processes printed, the main one first."""
        return "\n".join(job.said for job in self.jobs)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to all, or to one rank, after which the others are stopped as torchrun does."""
        for job in self.jobs if rank is None else [self.jobs[rank]]:
            job.signal(signal.SIGKILL)
        self.end()

    def end(self) -> list[int | None]:
        """The exit statuses of all, None for a killed one. When one fails the others are stopped."""
        while running := [job for job in self.jobs if not job.ended]:
            if any(job.ended and job.status != 0 for job in self.jobs):
                time.sleep(0.1)  # how often torchrun looks
                self.stop()
            else:
                _read_any(running, SECONDS)
        return [job.status for job in self.jobs]

    def stop(self, patience: float = 30.0) -> float:
        """SIGTERM to all, and SIGKILL to who is deaf to it; the seconds until the last was gone."""
        start = time.monotonic()
        for job in self.jobs:
            job.signal(signal.SIGTERM)
        try:
            while running := [job for job in self.jobs if not job.ended]:
                _read_any(running, start + patience - time.monotonic())
        except TimeoutError:
            self.kill()
        return time.monotonic() - start


def _read_any(jobs: list[Job], seconds: float) -> None:
    """Wait until one of the jobs has something to report, and take it in."""
    ready, _, _ = select.select([job.connection for job in jobs], [], [], max(0.0, seconds))
    if not ready:
        raise TimeoutError("\n".join(f"{job.log} hangs:\n{job.said[-2000:]}" for job in jobs))
    for job in jobs:
        if job.connection in ready:
            job.read()


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker of its place."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
