"""What two models say of a row, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.answers import sides_in
from prefopt.data.collation import Collator, Row
from prefopt.models import load_model
from prefopt.reference.live import plan_of
from prefopt.scoring.model import DISTRIBUTION, enable_scoring, refuse_unsupported


def token_numbers(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    start: tuple[str, str | None],
    reference: tuple[str, str | None] | None,
    **options: Any,
) -> Mapping[str, Mapping[str, list[float]]]:
    """`{side: {name: [scored tokens]}}` in nats, of the chosen and the rejected answer, or of the completion.

    `logp` is of the trained `model`; `before` and `after` are log-ratios to the reference, of the model that training
    started from and of the trained one; `kl` is KL(reference || trained) of the next-token distributions. Without a
    `reference` of its own it is the starting model, and `before` is 0. `start` and `reference` are names with their
    revisions; `options` go to `load_model`.
    """
    sides = [side for side in sides_in(row) if side in ("chosen", "rejected", "completion")]
    collate = Collator(pad_token_id=tokenizer.pad_token_id or 0, paired="chosen" in sides)
    batch, lengths = collate([row]), [int(row[f"{side}_scored"].sum()) for side in sides]
    with torch.inference_mode():
        known = _open(*(reference or start), options)
        whole = known(**plan_of(batch), statistics=DISTRIBUTION)["distribution"]
        first = known if reference is None else _open(*start, options)
        before = first(**plan_of(batch), statistics=("logp", "ref_logp"), reference=whole)
        after = _open(model, None, options)(
            **plan_of(batch), statistics=("logp", "ref_logp", "forward_kl"), reference=whole
        )
    numbers = {
        "logp": after["logp"],
        "before": before["logp"] - before["ref_logp"],
        "after": after["logp"] - after["ref_logp"],
        "kl": after["forward_kl"],
    }
    split = {name: values.float().split(lengths) for name, values in numbers.items()}
    return {side: {name: parts[place].tolist() for name, parts in split.items()} for place, side in enumerate(sides)}


def _open(name: str, revision: str | None, options: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = load_model(name, revision=revision, **options)
    refuse_unsupported(model)
    enable_scoring(model)
    return model.eval()
