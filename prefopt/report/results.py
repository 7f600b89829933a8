"""`metrics.jsonl`, one line per logging event, and `results.json`, the figures and versions of a finished run.

Both are strict JSON, which has no NaN: a number that is not finite is written as the text "nan", "inf" or "-inf",
so that it stays visible, and comes back as a number when read.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefopt.errors import DataError

METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
PACKAGES = ("prefopt", "torch", "transformers", "accelerate", "peft", "datasets", "trl")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SECRET_NAME = re.compile(r"(api_key|password|secret|(^|_)(hub|hf|auth|access|api)_token|^token)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"hf_[A-Za-z0-9]{16,}\b")


def write_metrics_line(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Append one logging event to a metrics file and hand it to the system at once."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_dumps(metrics) + "\n")
        file.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The logging events of a metrics file, in order; empty when there is no file.

    A last line without its end was cut off by a kill and is left out. Any other bad line raises `DataError`.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not a line of JSON ({error.msg}); remove the line") from error
        events.append({name: _number(value) for name, value in event.items()})
    return events


class MetricsFile(TrainerCallback):
    """Writes every logging event of a run to `metrics.jsonl` in its output folder, from the first rank only.

    A run that resumes begins with the events its checkpoint knows of, so no step appears twice.
    """

    def __init__(self) -> None:
        self._has_written = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the file agree with the step at which training starts."""
        path = Path(str(args.output_dir)) / METRICS_FILE
        if not state.is_world_process_zero:
            return
        if state.global_step:
            write_whole(path, "".join(_dumps(_event(line)) + "\n" for line in state.log_history))
        elif not self._has_written:
            path.unlink(missing_ok=True)  # left by an earlier run in the same folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the event, with its step and epoch in front."""
        if not state.is_world_process_zero or logs is None:
            return
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_metrics_line(folder / METRICS_FILE, {"step": state.global_step, "epoch": state.epoch, **logs})
        self._has_written = True


def write_results(folder: str | Path, results: Mapping[str, Any]) -> Path:
    """Write `results.json` into a run folder: `results`, and what they were made with.

    Adds `versions` (packages and Python) and `devices` (hardware names) where `results` has none. Secrets are left
    out. The file is replaced in one step, so a reader never sees half of it.
    """
    complete = {"versions": versions(), "devices": devices(), **results}
    path = Path(folder) / RESULTS_FILE
    write_whole(path, json.dumps(plain(without_secrets(complete)), indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path


def versions() -> dict[str, str]:
    """Version of every package that shapes a run and is installed, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """Names of the accelerators this process can see, or the kind of processor."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return ["Apple GPU"]
    return [f"CPU ({platform.machine()})"]


def without_secrets(value: Any) -> Any:
    """A copy without the entries whose name says they are secret (tokens of a hub, API keys, passwords).

    Names such as `pad_token` stay. A Hugging Face token inside another text is blanked, and an `env` block, which
    holds whatever a user exports, is left out.
    """
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if not _SECRET_NAME.search(str(name)) and name != "env"}
        return {name: without_secrets(item) for name, item in kept.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return _SECRET_TEXT.sub("(removed)", value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """The same as values of strict JSON: tensors and numpy scalars as numbers, paths and numbers not finite as text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Iterable) and not isinstance(value, torch.Tensor):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float) else str(value)


def write_whole(path: Path, text: str) -> None:
    """Put `text` into the file `path` in one step: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f"_{path.name}.tmp")  # names with `_` in front are never pushed to the Hub
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _event(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the Trainer's history as it stands in the file: step and epoch in front."""
    return {"step": line["step"], "epoch": line.get("epoch"), **line}


def _dumps(metrics: Mapping[str, Any]) -> str:
    return json.dumps(plain(metrics), allow_nan=False)


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
