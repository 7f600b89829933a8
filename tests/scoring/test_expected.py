"""The forward KL by way of expected head rows: the same as from whole distributions, where both heads are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.errors import UserError
from prefopt.scoring import Distribution, ExpectedRows, expected_rows, statistics_of
from tests.scoring.test_head import Allocations, problem, use_tiles

STATISTICS = ("logp", "ref_logp", "forward_kl", "entropy")


def shared_head(
    dtype: torch.dtype, step: float = 0.3, scale: float = 1.0, **sizes: int
) -> tuple[Distribution, Distribution, Tensor]:
    """A policy, with gradient at its hidden states, a step away from its reference, on one frozen head."""
    given = problem(dtype=dtype, **sizes)
    head, bias = given["head"].detach(), given["bias"].detach()
    generator = torch.Generator().manual_seed(3)
    moved = given["hidden"].detach() + step * torch.randn(given["hidden"].shape, generator=generator).to(dtype)
    policy = Distribution(moved.requires_grad_(), head, bias, scale)
    return policy, Distribution(given["hidden"].detach(), head, bias, scale), given["targets"]


def both_ways(policy: Distribution, reference: Distribution, targets: Tensor) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Statistics and the gradient of an uneven sum, from whole distributions and from expected rows."""
    ways = []
    for given in (reference, expected_rows(reference, targets)):
        scores = statistics_of(policy, targets, STATISTICS, given)
        weight = torch.arange(1, len(targets) + 1)
        loss = (weight * scores["logp"]).sum() + (weight.flip(0) * scores["forward_kl"]).sum()
        ways.append((scores, torch.autograd.grad(loss, policy.hidden)[0]))
    return ways


@pytest.mark.parametrize("tiles", [(1, 1), (2, 3), (7, 4), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_equal_to_whole_distributions(monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int], scale: float) -> None:
    use_tiles(monkeypatch, *tiles)
    (expected, slope), (found, found_slope) = both_ways(*shared_head(torch.float64, scale=scale))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_slope, slope, rtol=1e-12, atol=1e-12)


def test_the_rows_are_means_under_the_reference() -> None:
    _, reference, targets = shared_head(torch.float64)
    rows = expected_rows(reference, targets)
    q = (reference.hidden @ reference.head.t() + reference.bias).softmax(-1)
    torch.testing.assert_close(rows.rows, q @ reference.head, rtol=1e-12, atol=1e-12)
    expected = (reference.hidden * (q @ reference.head)).sum(1)
    torch.testing.assert_close(rows.mean_logit, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [0.003, 0.1])
def test_float32_keeps_six_digits_after_the_point(step: float) -> None:
    """Also where the divergence is far smaller than the logits."""
    sizes = {"tokens": 50, "width": 128, "vocabulary": 4000}
    policy, reference, targets = shared_head(torch.float32, step, scale=128**-0.5, **sizes)
    found = statistics_of(policy, targets, ("forward_kl",), expected_rows(reference, targets))["forward_kl"]
    wide = [
        Distribution(each.hidden.detach().double(), each.head.double(), each.bias.double(), each.scale)
        for each in (policy, reference)
    ]
    expected = statistics_of(wide[0], targets, ("forward_kl",), wide[1])["forward_kl"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-6)


def test_half_precision_makes_rows_in_float32() -> None:
    policy, reference, targets = shared_head(torch.bfloat16, tokens=30, width=32, vocabulary=500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = expected_rows(reference, targets)
        found = statistics_of(policy, targets, STATISTICS, rows)
        expected = statistics_of(policy, targets, STATISTICS, reference)
    assert rows.rows.dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_it_costs_what_log_probabilities_cost() -> None:
    policy, reference, targets = shared_head(torch.float32, tokens=8)
    rows = expected_rows(reference, targets)

    def work(statistics: tuple[str, ...], given: Any) -> int:
        with Allocations() as seen:
            scores = statistics_of(policy, targets, statistics, given)
            torch.autograd.grad(sum(scores.values()).sum(), policy.hidden)
        return seen.flops

    assert work(("logp", "forward_kl"), rows) == work(("logp",), None)


def test_no_token_works() -> None:
    policy, reference, targets = shared_head(torch.float32, tokens=0)
    scores = statistics_of(policy, targets, STATISTICS, expected_rows(reference, targets))
    sum(value.sum() for value in scores.values()).backward()
    assert policy.hidden.grad.shape == policy.hidden.shape


def test_what_it_does_not_hold_for_is_refused() -> None:
    policy, reference, targets = shared_head(torch.float64)
    rows = expected_rows(reference, targets)
    assert isinstance(rows, ExpectedRows) and not rows.rows.requires_grad
    capped = Distribution(policy.hidden, policy.head, softcap=3.0)
    for call in (lambda: expected_rows(capped, targets), lambda: statistics_of(capped, targets, STATISTICS, rows)):
        with pytest.raises(UserError, match="caps its logits"):
            call()
    trains = Distribution(policy.hidden, policy.head.clone().requires_grad_())
    with pytest.raises(UserError, match="head trains"):
        statistics_of(trains, targets, STATISTICS, rows)
    with pytest.raises(UserError, match="reverse KL"):
        statistics_of(policy, targets, ("reverse_kl",), rows)
