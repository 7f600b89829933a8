"""Start-up check: do the scores agree with the log-probabilities of the model's own, ordinary forward?

Model families multiply, divide and cap their logits under ever new names. A table knows those of today; this check
finds the others before a step is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import UserError
from prefopt.scoring.model import causal_lm
from prefopt.scoring.modes import evaluating
from prefopt.scoring.rounding import BEYOND, rounding_bound

ROWS = 4
_WRONG_LAYOUT = 0.1  # nats a token
SAFETY = 8.0  # times the rounding expected; a forgotten scale or cap is usually off by orders of magnitude more

_BACKBONE_INPUTS = ("input_ids", "attention_mask", "position_ids")
_SUSPECT_FIELD = re.compile(r"logit|softcap|soft_cap|multiplier|scaling|scale")


@dataclass(frozen=True)
class SelfCheck:
    """Largest difference found between a score and the model's own log-probability, and its bound, in nats a token."""

    max_difference: float
    bound: float


def check_scores(model: nn.Module, batch: Mapping[str, Any], tolerance: float | None = None) -> SelfCheck:
    """Compare scores with the log-softmax of the model's own logits on the first rows of `batch`.

    `batch` holds `input_ids` `[R, T]`, `source` and `target` `[M]`, and, if the rows need them, `attention_mask` and
    `position_ids`. Both forwards run in eval mode without gradient; the model's mode is restored. The bound is
    `tolerance` or, by default, `SAFETY` times the rounding to expect, see `_rounding`. Call it on every rank of a
    sharded model. Raises `UserError` beyond the bound, `ValueError` if nothing is scored.
    """
    inputs, source, target = _first_rows(batch)
    if not len(source):
        raise ValueError("the rows given for the self-check score no token")
    with evaluating(model):
        scores = model(**inputs, source=source, target=target)["logp"]
        logits, dtype, width = _own_logits(model, inputs)
    logits = logits.flatten(0, 1).index_select(0, source).to(scores.dtype)
    expected = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    bound = SAFETY * _rounding(logits, expected, dtype, width) if tolerance is None else tolerance
    result = SelfCheck(float((scores - expected).abs().max()), bound)
    if not result.max_difference <= result.bound:  # NaN must not pass
        raise UserError(_message(model, result))
    return result


def check_layouts(
    model: nn.Module, plain: Mapping[str, Any], shared: Mapping[str, Any], sequence: Tensor, mixed_precision: str
) -> SelfCheck:
    """Compare the scores of the same completions in two row layouts, without gradient.

    `plain` and `shared` are what the model's scoring forward takes, `sequence` `[M]` the completion of each scored
    token. The difference is the root mean square over the tokens of a completion, of the worst one. What a layout gets
    wrong moves scores by tenths of a nat and more, so in half precision that is the bound.
    """
    with evaluating(model):
        expected, found = (model(**plan)["logp"].double() for plan in (plain, shared))
    if not len(expected):
        return SelfCheck(0.0, 0.0)
    size = int(sequence.max()) + 1
    squares = expected.new_zeros(size).index_add(0, sequence, (found - expected).square())
    lengths = torch.bincount(sequence, minlength=size).clamp(min=1)
    bound = BEYOND * rounding_bound(model, mixed_precision, 1) * max(1.0, float(expected.abs().max()))
    return SelfCheck(float((squares / lengths).max().sqrt()), min(bound, _WRONG_LAYOUT))


def _first_rows(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    rows = min(ROWS, batch["input_ids"].shape[0])
    inputs = {name: _cut(batch[name], rows) for name in _BACKBONE_INPUTS if batch.get(name) is not None}
    inside = batch["source"] < rows * batch["input_ids"].shape[1]
    return inputs, batch["source"][inside], batch["target"][inside]


def _cut(value: Any, rows: int) -> Any:
    """The first rows of a tensor, or of each mask in a mapping (families that mix kinds of attention take one)."""
    if isinstance(value, Mapping):
        return {name: _cut(part, rows) for name, part in value.items()}
    return value[:rows]


def _own_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, torch.dtype, int]:
    """Logits `[R, T, V]` of the ordinary forward, the dtype its head puts out, and the hidden size.

    The dtype is caught at the head because autocast and accelerate convert before and after it.
    """
    head: nn.Module = causal_lm(model).get_output_embeddings()
    seen: list[tuple[torch.dtype, int]] = []
    hook = head.register_forward_hook(lambda _, args, output: seen.append((output.dtype, args[0].shape[-1])))
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    dtype, width = seen[0] if seen else (logits.dtype, causal_lm(model).config.hidden_size)
    return logits, dtype, width


def _rounding(logits: Tensor, logp: Tensor, dtype: torch.dtype, width: int) -> float:
    """Rounding to expect of a log-probability, in nats: unit roundoff times size, of the logits as stored in `dtype`
    and of the sums over `width` hidden units that make them."""
    sums = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logit, largest = float(logits.abs().max()), max(1.0, float(logits.abs().max()), float(logp.abs().max()))
    return (torch.finfo(dtype).eps * logit + math.sqrt(width) * torch.finfo(sums).eps * largest) / 2


def _message(model: nn.Module, result: SelfCheck) -> str:
    inner = causal_lm(model)
    kind = type(inner).__name__
    fields = {
        name: value
        for name, value in inner.config.to_dict().items()
        if _SUSPECT_FIELD.search(name) and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    found = ", ".join(f"{name}={value}" for name, value in sorted(fields.items())) or "none"
    return (
        f"scores of {kind} differ from the model's own log-probabilities by {result.max_difference:.3g} "
        f"nats a token (bound {result.bound:.3g}). This family probably scales, caps or transforms its logits in a way "
        f"prefopt does not know; configuration fields that may say so: {found}. Training would optimise the wrong "
        "distribution: use another model, and report this family with these numbers."
    )
