"""What a job says of itself while it runs: where training is, on a socket that closes with the process."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import transformers.trainer
from transformers import TrainerCallback


class Reports:
    """One line of JSON for each event. `listeners` hear each as well, before it is sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.listeners: list[Callable[[str, int], None]] = []

    def send(self, event: str, step: int = 0, **more: Any) -> None:
        for listener in self.listeners:
            listener(event, step)
        line = json.dumps({"event": event, "step": step, "time": time.monotonic(), **more}) + "\n"
        self._connection.sendall(line.encode())


def report_progress(reports: Reports) -> None:
    """Make every trainer of this process report: begin, step, evaluate, save, end."""

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reports.send("begin", state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reports.send("step", state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reports.send("evaluate", state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reports.send("save", state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reports.send("end", state.global_step)

    transformers.trainer.DEFAULT_CALLBACKS.append(Progress)  # type: ignore[arg-type]
