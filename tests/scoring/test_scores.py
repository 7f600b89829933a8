"""Sums, means and slices of per-token scores, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefopt.scoring.scores import MissingStatistic, TokenScores

LENGTHS = [3, 0, 2, 1]
SEQUENCE = torch.tensor([0, 0, 0, 2, 2, 3])
LOGP = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64)


def make(**changes: Tensor | None) -> TokenScores:
    return TokenScores(4, SEQUENCE, **{"logp": LOGP, **changes})


def per_completion(values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(LENGTHS)]


def test_total_mean_and_lengths() -> None:
    scores = make()
    assert scores.total("logp").tolist() == [sum(part) for part in per_completion(LOGP)]
    assert scores.mean("logp").tolist() == [-7 / 3, 0.0, -12.0, -32.0]
    assert scores.lengths.tolist() == LENGTHS and scores.lengths.dtype == torch.int64


def test_token_weights_enter_sum_and_mean_but_not_lengths() -> None:
    scores = make(token_weight=WEIGHT)
    assert scores.total("logp").tolist() == [-2.0, 0.0, -32.0, -8.0]
    assert scores.mean("logp").tolist() == [-2.0 / 1.5, 0.0, -32.0 / 3, -32.0]
    assert scores.lengths.tolist() == LENGTHS


def test_weights_that_are_all_zero_give_zero_and_finite_gradients() -> None:
    logp = LOGP.clone().requires_grad_()
    scores = make(logp=logp, token_weight=torch.zeros_like(WEIGHT))
    scores.mean("logp").sum().backward()
    assert scores.mean("logp").tolist() == [0.0] * 4
    assert logp.grad is not None and not logp.grad.any()


def test_log_ratio_is_weighted_and_differentiable_in_the_policy() -> None:
    logp = LOGP.clone().requires_grad_()
    scores = make(logp=logp, ref_logp=LOGP / 2, token_weight=WEIGHT)
    assert scores.log_ratio().tolist() == [-1.0, 0.0, -16.0, -4.0]
    scores.log_ratio().sum().backward()
    assert logp.grad is not None and torch.equal(logp.grad, WEIGHT)


def test_statistics_are_attributes() -> None:
    scores = make(entropy=WEIGHT, forward_kl=WEIGHT + 1, reverse_kl=WEIGHT + 2)
    assert torch.equal(scores.entropy, WEIGHT)
    assert torch.equal(scores.forward_kl, WEIGHT + 1) and torch.equal(scores.reverse_kl, WEIGHT + 2)
    assert scores.total("forward_kl").tolist() == [4.5, 0.0, 5.0, 1.25]


def test_missing_statistic_is_named() -> None:
    with pytest.raises(MissingStatistic, match=r"`forward_kl`.*needs"):
        _ = make().forward_kl
    with pytest.raises(MissingStatistic, match="ref_logp"):
        make().log_ratio()
    with pytest.raises(MissingStatistic, match="entropy"):
        make().total("entropy")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = make().nothing


def test_only_hides_what_was_not_declared() -> None:
    scores = make(entropy=WEIGHT, ref_logp=LOGP, token_weight=WEIGHT)
    kept = scores.only(("ref_logp",))
    assert kept.log_ratio().tolist() == [0.0] * 4
    assert kept.token_weight is WEIGHT and kept.size == 4
    with pytest.raises(MissingStatistic, match="entropy"):
        _ = kept.entropy
    assert torch.equal(scores.entropy, WEIGHT)


@pytest.mark.parametrize(("completions", "tokens"), [((0, 2), (0, 3)), ((2, 4), (3, 6)), ((1, 2), (3, 3))])
def test_slice_renumbers_and_keeps_everything(completions: tuple[int, int], tokens: tuple[int, int]) -> None:
    scores = make(ref_logp=LOGP / 2, token_weight=WEIGHT)
    part = scores.slice(slice(*completions), slice(*tokens))
    side = slice(*completions)
    assert part.size == side.stop - side.start
    assert torch.equal(part.lengths, scores.lengths[side])
    assert torch.equal(part.total("logp"), scores.total("logp")[side])
    assert torch.equal(part.mean("ref_logp"), scores.mean("ref_logp")[side])
    assert torch.equal(part.log_ratio(), scores.log_ratio()[side])


def test_no_completion_and_no_token() -> None:
    logp = torch.zeros(0, requires_grad=True)
    for size in (0, 2):
        scores = TokenScores(size, torch.zeros(0, dtype=torch.int64), logp, ref_logp=logp.detach())
        assert scores.lengths.tolist() == scores.total("logp").tolist() == scores.mean("logp").tolist() == [0] * size
        scores.log_ratio().sum().backward()
    assert logp.grad is not None and logp.grad.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    scores = make(logp=LOGP.to(dtype), ref_logp=LOGP.to(dtype), token_weight=WEIGHT.to(torch.float32))
    assert scores.mean("logp").dtype == dtype and make(logp=LOGP.to(dtype)).total("logp").dtype == dtype
    assert make(logp=LOGP.to(dtype), ref_logp=LOGP.to(dtype)).log_ratio().dtype == dtype


def test_float64_sums_are_not_rounded_to_float32() -> None:
    tiny = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    assert TokenScores(1, torch.zeros(2, dtype=torch.int64), tiny).total("logp").item() == 1.0 + 1e-12


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"ref_logp has shape \(5,\), the token list \(6,\)"):
        make(ref_logp=LOGP[:5])
    with pytest.raises(ValueError, match="token_weight"):
        make(token_weight=WEIGHT[:1])
