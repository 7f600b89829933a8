"""The pushes of a run: one after another in the background, each told in a line and noted in `push.json`.

Nothing here raises, and nothing waits for a push while a model trains.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from transformers.trainer_utils import HubStrategy

from prefopt.console import say
from prefopt.hub.files import Files, folder_files
from prefopt.hub.sending import Destination, Sent, open_repository, send, why
from prefopt.report.results import write_whole

RECORD = "push.json"
_THREAD = "prefopt push"


@dataclass
class Push:
    """What to send where, under a name for the log; without `collect`, only the repository is made ready."""

    name: str
    destination: Destination
    message: str = ""
    collect: Callable[[], Files] | None = None
    held: Path | None = None  # removed when the push is over
    result: Future[Sent | None] = field(default_factory=Future)


class Pushes:
    """The pushes of one run folder. While one is under way the next one waits, and a later one takes its place.

    With `every` none is left out: all wait for their turn. `strategy` is only noted, for whoever pushes the folder
    later.
    """

    def __init__(self, folder: Path, strategy: str, *, every: bool = False) -> None:
        self.folder = folder
        self._strategy = strategy
        self._every = every
        self._waiting: deque[Push] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, push: Push) -> Future[Sent | None]:
        """Send when the pushes before are over. The future holds what was sent, or None; it never fails."""
        with self._lock:
            passed_over = [] if self._every else list(self._waiting)
            if not self._every:
                self._waiting.clear()
            self._waiting.append(push)
            if self._thread is None:
                # A daemon: a process that has come to its end does not stay alive for an upload.
                self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
                self._thread.start()
        for old in passed_over:
            if old.collect is not None:
                say(f"push: {old.name} is left out: the push before it is still under way, and {push.name} comes next")
            _finish(old, None)
        return push.result

    def wait(self) -> None:
        """Return when no push is under way."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                push = self._waiting.popleft()
            _finish(push, self._run(push))

    def _run(self, push: Push) -> Sent | None:
        try:
            with _quietly():
                if push.collect is None:
                    _tell(f"push: the run goes to {open_repository(push.destination)}")
                    return None
                outcome: Sent | str = send(push.collect(), push.destination, push.message)
        except Exception as error:  # whatever it is, the training has nothing to do with it
            outcome = why(error, push.destination)
        if isinstance(outcome, Sent):
            _tell(f"push: {push.name} is on the Hub: {told(outcome)}")
        else:
            _tell(f"push: {push.name} is not on the Hub: {outcome}. {self._remedy(push)}")
        if push.collect is not None:
            with suppress(OSError):
                note(self.folder, push.destination, self._strategy, push.message, outcome)
        return outcome if isinstance(outcome, Sent) else None

    def _remedy(self, push: Push) -> str:
        if push.collect is None:
            return "It is tried again with the first push"
        return f"The files are in {self.folder}; to send them: {push.destination.command(self.folder)}"


_QUEUES: dict[Path, Pushes] = {}


def pushes_of(folder: Path, strategy: str, *, every: bool = False) -> Pushes:
    """The pushes of a run folder: of this process, one queue, whoever sends from it."""
    return _QUEUES.setdefault(folder.resolve(), Pushes(folder, strategy, every=every))


def push_again(folder: Path, settings: Mapping[str, Any]) -> None:
    """Send a run folder in the background, as stages after its training have left it; on the main process.

    `settings` are those of its recipe; nothing is done where it is not pushed.
    """
    if not settings.get("push_to_hub"):
        return
    strategy = HubStrategy(settings.get("hub_strategy") or HubStrategy.EVERY_SAVE).value
    destination = Destination(
        settings.get("hub_model_id") or folder.resolve().name,
        settings.get("hub_private_repo"),
        settings.get("hub_revision"),
        settings.get("hub_token"),
    )
    queue = pushes_of(folder, strategy, every=bool(settings.get("hub_always_push")))
    queue.submit(Push("the report", destination, "Report of all stages", lambda: folder_files(folder, strategy)))


def wait_for_pushes() -> None:
    """Return when no push of this process is under way; call it when nothing else is left to do."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()


def told(sent: Sent) -> str:
    """What was sent, in a few words."""
    count = len(sent.files)
    return f"{count} file{'s' * (count != 1)}, {sent.bytes:,} bytes, in {sent.repo} (commit {sent.oid[:7]})"


def note(folder: Path, destination: Destination, strategy: str, message: str, outcome: Sent | str) -> None:
    """Add a push, or why it failed, to the folder's `push.json`, which says where it is pushed in a recipe's words."""
    entry = {"message": message, **(asdict(outcome) if isinstance(outcome, Sent) else {"failed": outcome})}
    record = {
        "hub_model_id": destination.repo,
        "hub_private_repo": destination.private,
        "hub_revision": destination.revision,
        "hub_strategy": strategy,
        "pushes": [*read_record(folder).get("pushes", []), entry],
    }
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `push.json` says of a folder; empty when it was never pushed."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _tell(line: str) -> None:
    with suppress(OSError):  # the screen may be gone
        say(line)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without huggingface_hub's bars, which would run over the training's own, and its notes on every retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with disable_progress_bars():
            yield
    finally:
        logger.setLevel(level)


def _finish(push: Push, sent: Sent | None) -> None:
    if push.held is not None:
        shutil.rmtree(push.held, ignore_errors=True)
    push.result.set_result(sent)
