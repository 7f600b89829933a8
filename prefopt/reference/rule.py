"""The rule by which a reference follows the policy: after which steps, and how far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.settings import MIXUP_ALPHA

AVERAGE_WIDTH = 4
"""Bytes of a weight's average, which is held in float32 at least."""


@dataclass(frozen=True)
class SyncRule:
    """After each step whose number `sync_steps` divides: reference <- a policy + (1 - a) reference, a = `mixup_alpha`.

    TR-DPO, arXiv 2404.09656: its soft update, and for a = 1 its hard one.
    """

    sync_steps: int
    mixup_alpha: float = MIXUP_ALPHA

    def __str__(self) -> str:
        when = "step" if self.sync_steps == 1 else f"{self.sync_steps} steps"
        return f"moving: every {when}, alpha {self.mixup_alpha:g}"

    def syncs(self, step: int) -> int:
        """How often the reference has followed once a step is done."""
        return step // self.sync_steps

    def holds_average(self, width: float) -> bool:
        """Whether an average is held beside weights of `width` bytes each; a copy needs none."""
        return self.mixup_alpha < 1 and width < AVERAGE_WIDTH


def sync_rule(reference: Mapping[str, Any] | None) -> SyncRule | None:
    """The rule in a `reference` block; None for a reference that never moves."""
    block = reference or {}
    steps, alpha = block.get("sync_steps"), block.get("mixup_alpha")
    return None if steps is None else SyncRule(int(steps), MIXUP_ALPHA if alpha is None else float(alpha))


def in_words(rule: SyncRule | None) -> str:
    """A sentence for the card of a model; empty where the reference stayed."""
    return f"The reference followed the policy, {rule} (TR-DPO, arXiv 2404.09656)." if rule else ""
