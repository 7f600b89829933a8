"""What a push sends: the files on a list, without what belongs to this machine, and never one that holds a token.

A reader of a model needs its weights, configuration, tokenizer and card. Everything else stays where it is: pickled
arguments, temporary files (`_*`), notes of the runner, and whatever else lies in the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from prefopt.checkpoints import MANIFEST, checkpoints_in, manifest_of_copy, newest_whole, problem
from prefopt.errors import UserError
from prefopt.recipe.write import to_yaml
from prefopt.report.card import CARD_FILE, on_hub, publishable, reproducible
from prefopt.report.plots import FOLDER as PLOTS
from prefopt.report.results import METRICS_FILE, RESULTS_FILE

Content = Path | bytes
Files = dict[str, Content]
"""What is sent, by its name in the repository."""

RECIPE_FILE = "recipe.yaml"
LAST = "last-checkpoint"
_ADAPTER_CONFIG = "adapter_config.json"
HELD = "_push-"  # names with `_` in front are never sent

MODEL = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", _ADAPTER_CONFIG,
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
    # The code of a model that transformers does not have.
    "configuration_*.py", "modeling_*.py", "tokenization_*.py",
)  # fmt: skip
REPORT = (CARD_FILE, RECIPE_FILE, RESULTS_FILE, METRICS_FILE, f"{PLOTS}/*.png")

_BINARY = (".safetensors", ".pt", ".pth", ".bin", ".distcp", ".png", ".model")
_SHORTEST_TOKEN = 8
_ANY_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
# What `from_pretrained` would read beside, or instead of, the weights of a later push.
_WHOLE_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_ADAPTER = re.compile(r"adapter_(config\.json|model\.safetensors)")


def run_files(folder: Path) -> Files:
    """The model and the report of a run folder, of its newest whole checkpoint while it holds no model, or of a model.

    Raises `UserError` when there is no model to send, or when it is a checkpoint that is not whole.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    reason = problem(folder) if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else None
    if reason is not None:
        raise UserError(f"{folder}: this checkpoint is not whole: {reason}; send another one")
    files = model_files(folder)
    if not holds_weights(files):
        checkpoint, _ = newest_whole(folder)
        files = {} if checkpoint is None else model_files(checkpoint)
    if not holds_weights(files):
        raise UserError(f"{folder}: holds no model: no *.safetensors, and no whole checkpoint that has them")
    return {**files, **report_files(folder)}


def folder_files(folder: Path, strategy: str) -> Files:
    """All that belongs on the Hub of a run: `run_files`, and the whole checkpoints a `hub_strategy` asks for."""
    files = run_files(folder)
    if strategy == HubStrategy.CHECKPOINT:
        newest, _ = newest_whole(folder)
        return {**files, **(checkpoint_files(newest, LAST) if newest else {})}
    if strategy == HubStrategy.ALL_CHECKPOINTS:
        for checkpoint in checkpoints_in(folder):
            files |= checkpoint_files(checkpoint, checkpoint.name) if problem(checkpoint) is None else {}
    return files


def model_files(folder: Path) -> Files:
    """Weights, configuration, tokenizer and adapter in a folder."""
    return _chosen(folder, MODEL)


def report_files(folder: Path) -> Files:
    """Card, recipe, results, metrics and plots in a run folder."""
    return _chosen(folder, REPORT)


def hold(files: Mapping[str, Content], folder: Path) -> Files:
    """The same files by names of their own in `folder`, so that they outlive the rotation of their checkpoint.

    Hard links: nothing is copied, and the room of a rotated checkpoint is free when its push is over. Where the disk
    has no hard links they are copies.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    held: dict[Content, Content] = {}
    for number, path in enumerate(dict.fromkeys(content for content in files.values() if isinstance(content, Path))):
        held[path] = own = folder / f"{number}-{path.name}"
        try:
            os.link(path, own)
        except OSError:
            shutil.copyfile(path, own)
    return {name: held.get(content, content) for name, content in files.items()}


def let_go(output_dir: Path, names: str = f"{HELD}*") -> None:
    """Remove what a run holds for its pushes: all of it, as after a kill, or what has this name."""
    for left in output_dir.glob(names):
        shutil.rmtree(left, ignore_errors=True)


def holds_weights(files: Iterable[str]) -> bool:
    """Whether weights are among these files; a sharded checkpoint keeps its own in another form."""
    return any(name.endswith(".safetensors") for name in files)


def checkpoint_files(folder: Path, name: str) -> Files:
    """All that a sealed checkpoint needs to be resumed elsewhere, under `name/`, with a manifest that verifies there.

    Left out are the pickled arguments and PEFT's empty card. The checkpoint is taken to be whole.
    """
    files: Files = {}
    changed: dict[str, bytes | None] = {TRAINING_ARGS_NAME: None, CARD_FILE: None}
    for file, path in _sealed(folder):
        if file not in changed:
            files[file] = content = _published(path)
            if isinstance(content, bytes):
                changed[file] = content
    files[MANIFEST] = manifest_of_copy(folder, changed).encode()
    return {f"{name}/{file}": content for file, content in files.items()}


def outdated(remote: Iterable[str], files: Iterable[str]) -> list[str]:
    """What earlier pushes left that would be read together with this one: other shards, an adapter, a checkpoint."""
    sent = set(files)
    whole = any(_WHOLE_MODEL.fullmatch(name) for name in sent)
    resumable = any(name.startswith(f"{LAST}/") for name in sent)

    def is_old(name: str) -> bool:
        weights = _WHOLE_MODEL.fullmatch(name) or _ADAPTER.fullmatch(name)
        return name not in sent and bool((whole and weights) or (resumable and name.startswith(f"{LAST}/")))

    return [name for name in remote if is_old(name)]


def left_behind(folder: Path, files: Mapping[str, Content]) -> list[str]:
    """Names at the top of a folder of which nothing is sent."""
    folder = folder.resolve()
    sent = {path.resolve().relative_to(folder).parts[0] for path in files.values() if isinstance(path, Path)}
    sent |= {Path(name).parts[0] for name in files}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def remarks(files: Mapping[str, Content]) -> list[str]:
    """What a reader of the files will miss."""
    if isinstance(files.get(_ADAPTER_CONFIG), Path | None):
        return []
    return [f"{_ADAPTER_CONFIG} goes without its base model, a folder of this machine: train from one on the Hub"]


def refuse_secrets(files: Mapping[str, Content], token: str | None = None) -> None:
    """Raise `UserError` when a text holds the Hub token, the one of this environment, or one of anybody.

    The whole push is refused: a model without one of its files would be half a model.
    """
    known = {token, get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    secrets = [secret.encode() for secret in known if secret and len(secret) >= _SHORTEST_TOKEN]
    for name, content in files.items():
        if name.endswith(_BINARY):
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if any(secret in text for secret in secrets) or _ANY_TOKEN.search(text):
            raise UserError(f"{name} holds an access token, so nothing is sent; take the token out of the file")


def size(content: Content) -> int:
    """Bytes of what is sent under one name."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _chosen(folder: Path, patterns: Iterable[str]) -> Files:
    folder = folder.resolve()
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    # A link may lead to anything on this machine.
    kept = [path for path in found if path.is_file() and path.resolve() == path and path.name[0] not in "_."]
    return {path.relative_to(folder).as_posix(): _published(path) for path in sorted(kept)}


def _sealed(folder: Path) -> Iterator[tuple[str, Path]]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return ((name, folder / name) for name in manifest["files"])


def _published(path: Path) -> Content:
    """A file as it is sent: itself, or its text without what only this machine knows."""
    if path.name == RECIPE_FILE:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        public = reproducible(publishable(settings))
        return path if public == settings else to_yaml(public).encode()
    if path.name not in _REWRITTEN:
        return path
    values = json.loads(path.read_text(encoding="utf-8"))
    public = _REWRITTEN[path.name](values)
    return path if public == values else (json.dumps(public, indent=2) + "\n").encode()


def _public_state(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "best_model_checkpoint": publishable(state.get("best_model_checkpoint"))}


def _public_adapter(config: dict[str, Any]) -> dict[str, Any]:
    """Without a local base model: nobody else has that folder, and its name may be somebody else's on the Hub."""
    base = config.get("base_model_name_or_path")
    return {**config, "base_model_name_or_path": base if on_hub(base) else None}


_REWRITTEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    RESULTS_FILE: publishable,
    "trainer_state.json": _public_state,
    _ADAPTER_CONFIG: _public_adapter,
}
