"""The fingerprint of a finished run: what must be the same, bit for bit, whatever happened on the way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from prefopt.checkpoints import newest_whole

# How long it took is no part of what came out, nor where it lies, nor which scores were found and which were made.
_TIMED = ("_runtime", "_per_second", "_time", "seconds")
_LEFT_OUT = ("best_model_checkpoint", "output_dir", "reference")


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of the final weights, figures and names of files of a run, and of all state in its last checkpoint."""
    parts: dict[str, Any] = {file.name: load_file(file) for file in run.glob("*.safetensors")}
    parts["metrics.jsonl"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts["results.json"] = json.loads((run / "results.json").read_text())
    parts["names"] = sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
    last = checkpoints(run)[-1]
    for file in (path for path in last.rglob("*") if path.is_file()):
        parts[f"checkpoint/{file.relative_to(last)}"] = _content(file)
    return {name: _hash(part) for name, part in parts.items() if part is not None}


def checkpoints(run: Path) -> list[Path]:
    """Its checkpoints, by step."""
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def sealed_step(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 when there is none."""
    folder, _ = newest_whole(run)
    return 0 if folder is None else int(folder.name.split("-")[1])


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        return torch.load(file, weights_only=False)
    return json.loads(file.read_text()) if file.name == "trainer_state.json" else None


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    """Add a value: tensors and arrays by their bytes, containers by their parts, all else by its text."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            if not str(name).endswith(_TIMED) and name not in _LEFT_OUT:
                digest.update(str(name).encode())
                _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} parts".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())
