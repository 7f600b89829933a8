"""The gap between the two answers of each pair under a model, scored as in training and shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch import nn

from prefopt.data.collation import Batch, Collator, Row, row_length
from prefopt.data.formats import Example
from prefopt.data.problems import DataReport
from prefopt.errors import NonFiniteError
from prefopt.procedures.easiness import Gap
from prefopt.procedures.train import open_policy, open_tokenizer
from prefopt.recipe import Recipe
from prefopt.reference.live import plan_of
from prefopt.scoring import TokenScores
from prefopt.scoring.model import enable_scoring, refuse_unsupported
from prefopt.scoring.modes import evaluating
from prefopt.token_cache import preparation


def answer_gaps(recipe: Recipe, examples: Sequence[Example], report: DataReport) -> dict[str, Gap]:
    """Example id -> gap under the model that a recipe starts from; pairs that are dropped for their length have none.

    The pairs become tokens as in training. Every rank calls this, scores its share, and gets all. Raises `UserError`
    as training does, and `NonFiniteError` for scores that are not finite.
    """
    args, tokenizer = recipe.training_arguments(), open_tokenizer(recipe)
    rows = preparation(tokenizer, args, recipe.objective()).tokens(examples, report, "easiness").rows
    model, state = open_policy(recipe, tokenizer), PartialState()
    refuse_unsupported(model)
    if not getattr(model, "is_quantized", False):  # such a model is on its device already
        model.to(state.device)
    enable_scoring(model)
    collate = Collator(pad_token_id=tokenizer.pad_token_id or 0, paired=True)
    found: list[tuple[str, Gap]] = []
    with torch.autocast(state.device.type, torch.bfloat16, enabled=bool(args.bf16)):
        for part in _batches(rows[state.process_index :: state.num_processes], args.per_device_eval_batch_size):
            gaps = _gaps(model, send_to_device(collate(part), state.device))
            found += zip([row["example_id"] for row in part], gaps, strict=True)
    everything = dict(gather_object(found) if state.num_processes > 1 else found)
    bad = [name for name, gap in everything.items() if not math.isfinite(gap.sum)]
    if bad:
        raise NonFiniteError(f"easiness: the scores of {len(bad)} pairs are not finite. Check the model's weights")
    return everything


def _batches(rows: Sequence[Row], size: int) -> Iterable[list[Row]]:
    """Rows of similar length together, the longest first."""
    ordered = sorted(rows, key=row_length, reverse=True)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _gaps(model: nn.Module, batch: Batch) -> list[Gap]:
    with evaluating(model):
        logp = model(**plan_of(batch))["logp"].float()
    scores, pairs = TokenScores(batch["size"], batch["sequence"], logp=logp), batch["desirable_size"]
    sums, means = scores.total("logp").tolist(), scores.mean("logp").tolist()
    return [Gap(sums[chosen] - sums[chosen + pairs], means[chosen] - means[chosen + pairs]) for chosen in range(pairs)]
