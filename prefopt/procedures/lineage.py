"""`lineage.json` in a stage's folder: what it started from, what it compared with, and what it left, as hashes.

A stage that starts from the model of an earlier one reads that one's record. So the chain is proved link by link: the
files are those the earlier stage left, the weights loaded are those it left, and they are the weights of the reference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.checkpoints import checkpoints_in
from prefopt.errors import UserError
from prefopt.models import holds_adapter
from prefopt.procedures.inputs import model_files, sha256_of
from prefopt.procedures.stage import Stage, TrainStage
from prefopt.ranks import on_main
from prefopt.reference.hashing import hash_json, plain
from prefopt.reference.identity import FLAT, Identity
from prefopt.referencing import identify_policy
from prefopt.report.results import write_whole

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

LINEAGE = "lineage.json"
VERSION = 1
_DELETE = "Delete the folder, and run its stage again"


@dataclass(frozen=True)
class Lineage:
    """The record of one training stage in its `folder`; `parent` is that of the stage whose model it starts from.

    `parent` is None for a model from elsewhere. `fresh_adapter`: the stage puts a new adapter on the model.
    `from_start`: its reference must be the model it starts from. Every rank calls the methods; they raise `UserError`
    for a link that does not hold.
    """

    folder: Path
    parent: Path | None
    fresh_adapter: bool
    from_start: bool

    def check_files(self) -> None:
        """Before anything is loaded: the parent's files must be those it left."""
        on_main(self._check_files)

    def begin(self, trainer: PreferenceTrainer) -> None:
        """Before the first step: check and record what the policy and its reference are."""
        _refuse_flat_weights(trainer)
        start, reference = identify_policy(trainer, fresh_adapter=self.fresh_adapter), trainer.reference_identity
        on_main(lambda: self._begin(start, reference))

    def finish(self, trainer: PreferenceTrainer) -> None:
        """When the model is saved: record what was left."""
        left = identify_policy(trainer, fresh_adapter=False)
        on_main(lambda: self._finish(left))

    def _finish(self, left: Identity) -> None:
        _write(self.folder, {**read_lineage(self.folder), "left": {**_facts(left), "files": _files(self.folder)}})

    def _check_files(self) -> None:
        if self.parent is None:
            return
        left, now = _left_by(self.parent)["files"], _files(self.parent)
        if changed := sorted(name for name in {*left, *now} if left.get(name) != now.get(name)):
            raise UserError(
                f"{self.parent}: not the model that its stage left: {', '.join(changed)} changed since. {_DELETE}"
            )

    def _begin(self, start: Identity, reference: Identity | None) -> None:
        if self.parent is not None:
            left = _left_by(self.parent)
            # Loading may round: weights that were trained in another dtype are proved by their files alone.
            if left["dtype"] == start.about["dtype"] and left["weights"] != start.weights:
                raise UserError(
                    f"{self.folder}: the policy that was loaded is not the one that {self.parent} left. {_DELETE}"
                )
        if self.from_start and reference is not None and reference.key != start.key:
            raise UserError(
                f"{self.folder}: the reference is not the model that this stage starts from"
                + (f", which {self.parent} left" if self.parent else "")
            )
        now = {"start": _facts(start), "reference": reference and _facts(reference)}
        if checkpoints_in(self.folder):
            before = read_lineage(self.folder)
            if changed := [name for name, facts in now.items() if before[name] != facts]:
                raise UserError(f"{self.folder}: went on from another {' and '.join(changed)} than it began with")
        _write(self.folder, {"parent": self.parent and str(self.parent), **now, "left": None})


def lineage_of(stage: Stage, plan: Sequence[Stage]) -> Lineage | None:
    """The record of a stage, where a plan trains more than once."""
    trained = [each for each in plan if isinstance(each, TrainStage)]
    if not isinstance(stage, TrainStage) or len(trained) < 2:
        return None
    model, recipe = stage.recipe.model, stage.recipe
    folders = [each.folder for each in trained[: trained.index(stage)]]
    start = model.model_name_or_path and Path(model.model_name_or_path)  # a path may be written in several ways
    parent = next((folder for folder in folders if folder == start), None)
    fresh = model.use_peft and not holds_adapter(model)
    return Lineage(stage.folder, parent, fresh, from_start=recipe.reference.model is None)


def read_lineage(folder: Path) -> dict[str, Any]:
    """The record in a stage's folder. Raises `UserError` when there is none, or it was edited."""
    path = folder / LINEAGE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        whole = bool(body.pop("seal") == hash_json(body)) and body["version"] == VERSION
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: missing, damaged or edited, so it proves nothing of the model here. {_DELETE}")
    return dict(body)


def _refuse_flat_weights(trainer: PreferenceTrainer) -> None:
    """Refuse FSDP 1 before the first step: the model can be identified now, and not when it has been wrapped."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise UserError(FLAT)


def _left_by(folder: Path) -> dict[str, Any]:
    left = read_lineage(folder)["left"]
    if left is None:
        raise UserError(f"{folder}: its stage began and left no model. {_DELETE}")
    return dict(left)


def _facts(identity: Identity) -> dict[str, Any]:
    return {"key": identity.key, "weights": identity.weights, "dtype": identity.about["dtype"]}


def _files(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in model_files(folder)}


def _write(folder: Path, record: dict[str, Any]) -> None:
    body = plain({"version": VERSION, **record})
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**body, "seal": hash_json(body)}, indent=1, sort_keys=True) + "\n"
    write_whole(folder / LINEAGE, text)
