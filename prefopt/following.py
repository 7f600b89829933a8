"""What a reference that follows the policy asks of a trainer: how it is scored, kept in checkpoints, and reported."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prefopt.console import say
from prefopt.errors import UserError
from prefopt.reference.live import AdapterOff, FrozenModel, Reference
from prefopt.reference.moving import MovingReference
from prefopt.reference.rule import SyncRule, sync_rule

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer


def source_of_scores(trainer: PreferenceTrainer) -> str:
    """Where the settings have reference scores come from; those of a reference that moves cannot be kept.

    Raises `UserError` for one that would move unread.
    """
    source, rule = str((trainer.args.reference or {}).get("source", "auto")), sync_rule(trainer.args.reference)
    if rule is None:
        return source
    if trainer.objective.reference == "none":
        raise UserError("reference: sync_steps has no effect, since this loss reads no reference. Remove it")
    if source == "auto":
        say("reference: it moves, and scores of the start would not stay true. It is scored beside the policy")
    return "live"


def follow(trainer: PreferenceTrainer, reference: Reference, rule: SyncRule) -> None:
    """Let the reference move while the trainer trains, and have checkpoints keep it."""
    assert isinstance(reference, (FrozenModel, AdapterOff))  # every other source keeps scores, or has none
    moving = MovingReference(trainer.model, reference, rule)
    trainer.add_callback(moving)
    trainer.kept.append(moving)


def reference_facts(trainer: PreferenceTrainer) -> dict[str, Any]:
    """What must be the same in a resumed run: the reference that training began with, and how it moves."""
    identity, rule = trainer.reference_identity, sync_rule(trainer.args.reference)
    moves = {} if rule is None else {f"reference.{name}": value for name, value in asdict(rule).items()}
    return {"reference": identity and identity.key, **moves}


def reference_figures(trainer: PreferenceTrainer) -> dict[str, float]:
    """What a line of the log says of a reference that moves: how often it has."""
    rule = sync_rule(trainer.args.reference)
    return {} if rule is None else {"reference/syncs": rule.syncs(trainer.state.global_step)}
