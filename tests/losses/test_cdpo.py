"""cDPO: its formula, its finite best margin, and what it is to DPO."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, exact, gradients, metrics, sigmoid, values

FACTS = Facts(at_the_reference=math.log(2), turns=True)

CHOSEN, REJECTED = zip(*RATIOS, strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.1), (0.7, 0.25), (2.0, 0.49)])
def test_agrees_with_exact_arithmetic(beta, smoothing, dtype, tolerance):
    found = values(make("cdpo", beta=beta, label_smoothing=smoothing), CHOSEN, REJECTED, dtype)
    for value, (a, b) in zip(found.tolist(), RATIOS, strict=True):
        z = beta * (a - b)
        expected = (1 - smoothing) * exact(z) + smoothing * exact(-z)
        assert value == pytest.approx(expected, rel=tolerance)


def test_a_value_by_hand():
    """-(0.9 log S(z) + 0.1 log S(-z)) at z = -3, 0, 3."""
    found = values(make("cdpo", beta=0.5), [-6.0, 0.0, 6.0], [0.0, 0.0, 0.0])
    assert found.tolist() == pytest.approx([2.7485873516, 0.6931471806, 0.3485873516], rel=1e-9)


def test_without_smoothing_it_is_dpo_to_the_last_bit():
    assert torch.equal(values(make("cdpo", label_smoothing=0), CHOSEN, REJECTED), values(make("dpo"), CHOSEN, REJECTED))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.49])
def test_equal_models_give_ln_2_whatever_the_smoothing(smoothing):
    loss = make("cdpo", label_smoothing=smoothing)
    assert values(loss, [0.0], [0.0]).item() == pytest.approx(math.log(2), rel=1e-15)


def test_is_dpo_with_a_linear_brake():
    h = torch.tensor(CHOSEN, dtype=torch.float64) - torch.tensor(REJECTED, dtype=torch.float64)
    brake = values(make("cdpo", beta=0.3, label_smoothing=0.2), CHOSEN, REJECTED) - values(
        make("dpo", beta=0.3), CHOSEN, REJECTED
    )
    torch.testing.assert_close(brake, 0.2 * 0.3 * h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.1), (0.5, 0.01), (2.0, 0.4)])
def test_the_best_margin_is_finite_and_the_slope_turns_there(beta, smoothing):
    loss, best = make("cdpo", beta=beta, label_smoothing=smoothing), math.log((1 - smoothing) / smoothing) / beta
    (below, at, above), _ = gradients(loss, [best - 1, best, best + 1], [0.0] * 3)
    assert below < 0 < above
    assert at == pytest.approx(0, abs=1e-15)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    assert values(loss, [best], [0.0]).item() == pytest.approx(entropy, rel=1e-14)


@pytest.mark.parametrize(("a", "b"), [(-30.0, 5.0), (0.3, 0.1), (12.0, -9.0)])
def test_gradient_is_that_of_the_formula(a, b):
    (chosen,), (rejected,) = gradients(make("cdpo", beta=0.2, label_smoothing=0.3), [a], [b])
    assert chosen == -rejected
    assert chosen == pytest.approx(-0.2 * (sigmoid(-0.2 * (a - b)) - 0.3), rel=1e-12)


def test_is_the_mean_of_dpo_over_flipped_labels():
    straight, flipped = values(make("dpo"), CHOSEN, REJECTED), values(make("dpo"), REJECTED, CHOSEN)
    mean = 0.7 * straight + 0.3 * flipped
    torch.testing.assert_close(values(make("cdpo", label_smoothing=0.3), CHOSEN, REJECTED), mean, rtol=1e-14, atol=0)


def test_one_pair_repeated_settles_at_the_best_margin():
    loss, h = make("cdpo", beta=0.5, label_smoothing=0.1), 0.0
    for _ in range(60):
        h -= 30.0 * gradients(loss, [h], [0.0])[0][0]
    assert h == pytest.approx(math.log(9) / 0.5, rel=1e-6)


@pytest.mark.parametrize("value", [0.5, 0.7, -0.1, math.nan])
def test_smoothing_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.label_smoothing: `cdpo` takes a number at least 0, below 0\.5, not"):
        make("cdpo", label_smoothing=value)


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `cdpo` takes a number above 0, not"):
        make("cdpo", beta=value)


def test_rewards_and_defaults():
    assert (make("cdpo").beta, make("cdpo").label_smoothing) == (0.1, 0.1)
    found = metrics(make("cdpo", beta=0.5), [3.0], [1.0])
    assert (found["rewards/chosen"], found["rewards/rejected"]) == ([1.5], [0.5])
