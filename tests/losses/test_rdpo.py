"""rDPO: unbiased under flips, linear in the margin beside DPO, and not bounded below."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, Bandit, gradients, metrics, sigmoid, values

FACTS = Facts(at_the_reference=math.log(2))

CHOSEN, REJECTED = zip(*RATIOS, strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("beta", "rate"), [(0.1, 0.1), (0.7, 0.25), (2.0, 0.45)])
def test_is_the_corrected_difference_of_two_dpo_losses(beta, rate, dtype, tolerance):
    dpo = make("dpo", beta=beta)
    straight, flipped = values(dpo, CHOSEN, REJECTED), values(dpo, REJECTED, CHOSEN)
    expected = ((1 - rate) * straight - rate * flipped) / (1 - 2 * rate)
    found = values(make("rdpo", beta=beta, label_smoothing=rate), CHOSEN, REJECTED, dtype)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-7 if dtype is torch.float32 else 1e-10)


def test_a_value_by_hand():
    """beta 0.5, h = 2, e = 0.2: (0.8 log(1 + e^-1) - 0.2 log(1 + e)) / 0.6 = -0.0200716."""
    found = values(make("rdpo", beta=0.5, label_smoothing=0.2), [3.0], [1.0]).item()
    assert found == pytest.approx((0.8 * 0.31326168751822286 - 0.2 * 1.3132616875182228) / 0.6, rel=1e-12)
    assert found == pytest.approx(-0.0200716, abs=1e-7)


def test_without_flips_it_is_dpo_to_the_last_bit():
    assert torch.equal(values(make("rdpo", label_smoothing=0), CHOSEN, REJECTED), values(make("dpo"), CHOSEN, REJECTED))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.49])
def test_the_mean_over_flips_is_dpo_on_the_clean_label(rate):
    loss = make("rdpo", label_smoothing=rate)
    mean = (1 - rate) * values(loss, CHOSEN, REJECTED) + rate * values(loss, REJECTED, CHOSEN)
    torch.testing.assert_close(mean, values(make("dpo"), CHOSEN, REJECTED), rtol=1e-10, atol=1e-9)


def test_the_mean_over_drawn_flips_is_dpo():
    flipped = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < 0.2
    loss = make("rdpo", label_smoothing=0.2)
    straight, wrong = values(loss, [4.0], [1.0]).item(), values(loss, [1.0], [4.0]).item()
    mean = torch.where(flipped, wrong, straight).mean().item()
    assert mean == pytest.approx(values(make("dpo"), [4.0], [1.0]).item(), abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(-30.0, 5.0), (0.0, 0.0), (12.0, -9.0)])
def test_gradient_is_dpos_and_a_constant(a, b):
    (chosen,), (rejected,) = gradients(make("rdpo", beta=0.2, label_smoothing=0.3), [a], [b])
    assert chosen == -rejected
    assert chosen == pytest.approx(-0.2 * (sigmoid(-0.2 * (a - b)) + 0.3 / 0.4), rel=1e-12)


def test_variance_over_flips():
    beta, rate, h = 0.3, 0.2, 7.0
    loss = make("rdpo", beta=beta, label_smoothing=rate)
    straight, wrong = values(loss, [h], [0.0]).item(), values(loss, [0.0], [h]).item()
    mean = (1 - rate) * straight + rate * wrong
    variance = (1 - rate) * (straight - mean) ** 2 + rate * (wrong - mean) ** 2
    assert variance == pytest.approx((beta * h) ** 2 * rate * (1 - rate) / (1 - 2 * rate) ** 2, rel=1e-12)


def test_is_not_bounded_below_and_says_so():
    loss = make("rdpo", beta=0.3, label_smoothing=0.3)
    assert values(loss, [200.0], [0.0]).item() == pytest.approx(-45, rel=1e-12)
    assert "not bounded below" in " ".join(loss.notes())


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_flipped_labels_give_the_policy_of_clean_ones(rate):
    rng = torch.Generator().manual_seed(3)
    clean = Bandit.bradley_terry(torch.randn(6, generator=rng, dtype=torch.float64))
    noisy = Bandit((1 - rate) * clean.wins + rate * clean.wins.T)
    found = noisy.optimum(make("rdpo", beta=0.4, label_smoothing=rate))
    torch.testing.assert_close(found, clean.optimum(make("dpo", beta=0.4)), rtol=0, atol=1e-8)
    assert (noisy.optimum(make("dpo", beta=0.4)) - found).abs().max() > 0.1


@pytest.mark.parametrize("value", [0.5, 0.7, -0.1, math.nan])
def test_a_rate_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.label_smoothing: `rdpo` takes a number at least 0, below 0\.5, not"):
        make("rdpo", label_smoothing=value)
    assert values(make("rdpo", label_smoothing=0.49), [3.0], [0.0]).isfinite()


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `rdpo` takes a number above 0, not"):
        make("rdpo", beta=value)


def test_rewards_and_defaults():
    assert (make("rdpo").beta, make("rdpo").label_smoothing) == (0.1, 0.1)
    found = metrics(make("rdpo", beta=0.5), [3.0], [1.0])
    assert (found["rewards/chosen"], found["rewards/rejected"]) == ([1.5], [0.5])
