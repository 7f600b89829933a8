"""How a checkpoint stands on preference data: any model, any preference file, with or without a reference.

The rows pass through the same collator and scoring forward as in training, every row counts once whatever the batch
and the number of processes, and each figure carries the count it is a mean of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.collation import Batch, Collator, Row, row_length
from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import DataError, NonFiniteError, UserError
from prefopt.metrics import MetricSums
from prefopt.models import load_model, load_tokenizer
from prefopt.reference.live import plan_of
from prefopt.scoring import TokenScores
from prefopt.scoring.model import enable_scoring, refuse_unsupported
from prefopt.scoring.modes import evaluating

Result = dict[str, Any]


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
) -> Result:
    """Score token rows with `model`, and with `reference` where given.

    Returns `{"rows": N, "paired": bool, "metrics": {name: {"value": float, "count": int}}}`. Log-probabilities are in
    nats; `logps/*` are summed over a completion, names with `per_token` are means over all scored tokens, and
    `entropy` is too. On pairs, `accuracy` is the share whose chosen answer is the likelier one (`accuracy_per_token`:
    by mean log-probability, which takes length out) and `reward_accuracy` the share whose log-ratio to the reference
    is the larger; `margin` and `reward_margin` are the differences. A tie counts as wrong. Desirable completions are
    reported as `chosen` and others as `rejected`.

    With an `accelerator`, rank r scores `rows[r::world]` and every rank returns the figures of all.
    Raises `DataError` without rows, and `NonFiniteError` with the rows whose scores are not finite.
    """
    if not rows:
        raise DataError("there is no row to evaluate")
    device = device or (accelerator.device if accelerator else next(model.parameters()).device)
    models = [model] if reference is None else [model, reference]
    for each in models:
        refuse_unsupported(each)
        enable_scoring(each.to(device))
    paired = "chosen_ids" in rows[0]
    collate = Collator(pad_token_id=tokenizer.pad_token_id or 0, paired=paired)
    sums, not_finite = MetricSums(), list[int]()
    for batch_rows in _batches(_share(rows, accelerator), batch_size):
        batch = send_to_device(collate(batch_rows), device)
        scores = _score(models, batch)
        not_finite += _rows_not_finite(batch, scores)
        _add(sums, batch, scores)
    _stop_if_any(not_finite, accelerator)
    figures = sums.reduce_figures(accelerator)
    metrics = {name: {"value": figure.value, "count": int(figure.count)} for name, figure in figures.items()}
    return {"rows": len(rows), "paired": paired, "metrics": metrics}


def evaluate_files(
    model_path: str,
    data: str | Sequence[str] | DataSpec,
    reference_path: str | None = None,
    *,
    batch_size: int = 8,
    max_length: int | None = 1024,
    max_dropped: float = 0.01,
    dtype: str = "auto",
) -> Result:
    """Evaluate the model or adapter at a local folder or Hub name on preference files, or on any other source.

    The figures are those of `evaluate_model`; beside them stand `model`, `reference`, `data` and `dropped` (rows left
    out, by reason). Bad rows are refused before a model is loaded. Under `accelerate launch` the processes share the
    rows, and each returns the whole result. Raises `UserError` for what cannot be opened.
    """
    source = data if isinstance(data, DataSpec) else DataSpec(data_files=data)
    tokenizer = load_tokenizer(model_path)
    if reference_path is not None:
        _require_same_tokens(tokenizer, reference_path)
    rows, dropped = _token_rows(source, tokenizer, TokenSettings(max_length=max_length, max_dropped=max_dropped))
    accelerator = Accelerator()
    result = evaluate_model(
        load_model(model_path, dtype=dtype),
        tokenizer,
        rows,
        reference=None if reference_path is None else load_model(reference_path, dtype=dtype),
        batch_size=batch_size,
        accelerator=accelerator,
    )
    return {"model": model_path, "reference": reference_path, "data": source.title, "dropped": dropped, **result}


def evaluation_text(result: Result) -> str:
    """A result as a table for the screen: what was evaluated, then each metric with its count."""
    kind = "pairs" if result["paired"] else "completions"
    lines = [f"{name:<10} {result[name]}" for name in ("model", "reference", "data") if result.get(name)]
    left_out = [f"{count} {reason}" for reason, count in result.get("dropped", {}).items() if count]
    lines.append(f"{'rows':<10} {result['rows']} {kind}" + (f", left out: {', '.join(left_out)}" if left_out else ""))
    width = max(len(name) for name in result["metrics"])
    lines += ["", f"{'metric':<{width}}  {'value':>12}  {'count':>9}"]
    for name, figure in result["metrics"].items():
        lines.append(f"{name:<{width}}  {figure['value']:>12.4f}  {figure['count']:>9}")
    return "\n".join(lines)


def _token_rows(
    source: DataSpec, tokenizer: PreTrainedTokenizerBase, settings: TokenSettings
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Token rows of a source, and how many were left out for which reason."""
    loaded = load_examples(source)
    rows, report = tokenize_examples(loaded.examples, tokenizer, settings)
    return rows, {reason: tally.count for reason, tally in report.dropped.items()}


def _share(rows: Sequence[Row], accelerator: Accelerator | None) -> list[Row]:
    """This rank's rows, longest first: a batch of similar lengths pads least, and memory runs out at once or never."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    return sorted(rows[rank::world], key=row_length, reverse=True)


def _batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _score(models: list[nn.Module], batch: Batch) -> TokenScores:
    """Policy scores and, with a second model, its log-probabilities as `ref_logp`."""
    plan = plan_of(batch)
    with evaluating(models[0]):
        statistics: dict[str, Tensor] = models[0](**plan, statistics=("logp", "entropy"))
    if len(models) > 1:
        with evaluating(models[1]):
            statistics["ref_logp"] = models[1](**plan)["logp"]
    return TokenScores(batch["size"], batch["sequence"], **statistics)


def _add(sums: MetricSums, batch: Batch, scores: TokenScores) -> None:
    size, tokens = batch["desirable_size"], batch["desirable_tokens"]
    chosen = scores.slice(slice(0, size), slice(0, tokens))
    rejected = scores.slice(slice(size, scores.size), slice(tokens, len(scores.sequence)))
    if batch["paired"]:
        sums.add(_pair_metrics(chosen, rejected))
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        sums.add(_side_metrics(name, side))
    sums.add({"entropy": scores.entropy})


def _pair_metrics(chosen: TokenScores, rejected: TokenScores) -> dict[str, Tensor]:
    margin = chosen.total("logp") - rejected.total("logp")
    metrics = {"accuracy": margin > 0, "accuracy_per_token": chosen.mean("logp") > rejected.mean("logp")}
    if "ref_logp" not in chosen.statistics:
        return {**metrics, "margin": margin}
    reward_margin = chosen.log_ratio() - rejected.log_ratio()
    return {**metrics, "reward_accuracy": reward_margin > 0, "margin": margin, "reward_margin": reward_margin}


def _side_metrics(name: str, side: TokenScores) -> dict[str, Tensor]:
    metrics = {f"logps/{name}": side.total("logp"), f"logp_per_token/{name}": side.logp}
    if "ref_logp" in side.statistics:
        metrics[f"logratios/{name}"] = side.log_ratio()
        metrics[f"logratio_per_token/{name}"] = side.logp - side.ref_logp
    return {**metrics, f"length/{name}": side.lengths}


def _rows_not_finite(batch: Batch, scores: TokenScores) -> list[int]:
    bad = torch.zeros(scores.size, dtype=torch.bool, device=scores.logp.device)
    for name in scores.statistics:
        bad |= ~torch.isfinite(scores.total(name))
    # A pair's completions are `[chosen..., rejected...]`, each in the order of the rows.
    found: list[int] = batch["row"][bad.view(-1, len(batch["row"])).any(dim=0)].tolist()
    return found


def _stop_if_any(not_finite: list[int], accelerator: Accelerator | None) -> None:
    if accelerator is not None and accelerator.num_processes > 1:
        not_finite = gather_object(not_finite)
    if not_finite:
        shown = ", ".join(str(row) for row in sorted(not_finite)[:10])
        raise NonFiniteError(
            f"evaluation: the scores of {len(not_finite)} rows are not finite, among them row {shown} (counted from "
            "0). Look at these rows, and check the model's weights"
        )


def _require_same_tokens(tokenizer: PreTrainedTokenizerBase, reference_path: str) -> None:
    """Refuse a reference that reads other ids: its scores of the policy's tokens would mean nothing."""
    if load_tokenizer(reference_path).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--reference: `{reference_path}` has another vocabulary than the model, so the two cannot be compared "
            "token by token. Use a reference with the same tokenizer, or leave it out"
        )
