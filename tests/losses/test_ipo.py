"""IPO: the regression of equation 17, per token and summed, its optimum on bandits, and soft labels."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores
from tests.losses.facts import Facts
from tests.losses.theory import RATIOS, Bandit, gradients, metrics, spelled, token_gradients, values
from tests.losses.views import run, single_tokens

FACTS = Facts(at_the_reference=25.0, turns=True, per_token=True)  # (1 / (2 beta))^2 at beta 0.1

CHOSEN, REJECTED = zip(*RATIOS, strict=True)


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_is_the_squared_distance_to_the_target(length, dtype, tolerance):
    found = values(make("ipo", beta=0.2, length=length), CHOSEN, REJECTED, dtype)
    for value, (a, b) in zip(found.tolist(), RATIOS, strict=True):
        assert value == pytest.approx((a - b - 2.5) ** 2, rel=tolerance)


def test_mean_and_sum_by_hand():
    """Log-ratios 2 over 2 tokens and -3 over 3: h is 1 + 1 per token and 2 + 3 summed; the target is 5."""
    micro = spelled([[-1.0, -3.0]], [[-4.0, -4.0, -4.0]], reference=-3.0)
    assert run(make("ipo"), micro).loss.item() == pytest.approx((2 - 5) ** 2, rel=1e-14)
    assert run(make("ipo", length="sum"), micro).loss.item() == pytest.approx((5 - 5) ** 2, abs=1e-28)
    assert token_gradients(make("ipo"), micro) == pytest.approx([-6 / 2] * 2 + [6 / 3] * 3, rel=1e-14)
    assert token_gradients(make("ipo", beta=0.25, length="sum"), micro) == pytest.approx([6] * 2 + [-6] * 3, rel=1e-14)


def test_token_weights_weigh_the_mean():
    sequence, weight = torch.zeros(2, dtype=torch.int64), torch.tensor([3.0, 1.0])
    chosen = TokenScores(1, sequence, torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -7.0]), token_weight=weight)
    rejected = TokenScores(1, sequence, torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0]))
    assert make("ipo", beta=0.5)(Pairs(chosen, rejected)).loss.item() == pytest.approx(((3 + 5) / 4 - 1) ** 2)


def test_one_longer_answer_does_not_move_the_target_of_the_mean():
    short, long = spelled([[-1.0]], [[-2.0]], reference=-1.5), spelled([[-1.0] * 200], [[-2.0] * 3], reference=-1.5)
    loss = make("ipo", beta=0.3)
    assert run(loss, short).loss.item() == pytest.approx(run(loss, long).loss.item(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 7])
def test_equal_lengths_relate_the_two_forms(n):
    """The mean form is the sum form at beta / n, over n squared."""
    micro = spelled([[-1.25] * n], [[-2.0] * n], reference=-1.5)
    mean = run(make("ipo", beta=0.3), micro).loss.item()
    assert mean == pytest.approx(run(make("ipo", beta=0.3 / n, length="sum"), micro).loss.item() / n**2, rel=1e-12)


# ---- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_one_pair_has_its_optimum_at_the_target_and_is_pulled_back_beyond_it(beta):
    target = 1 / (2 * beta)
    (below, at, above), rejected = gradients(make("ipo", beta=beta), [target - 1, target, target + 3], [0.0] * 3)
    assert (below, at, above) == pytest.approx((-2, 0, 6), abs=1e-12)
    assert rejected == [-below, -at, -above]


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_of_a_bandit_without_any_reward(beta):
    """Arbitrary preferences, in circles even: ref exp(p(y beats mu) / beta) / Z for uniform mu, y itself included."""
    rng = torch.Generator().manual_seed(5)
    upper = torch.rand(5, 5, generator=rng, dtype=torch.float64).triu(1)
    wins = upper + (1 - upper.T).tril(-1) + torch.eye(5, dtype=torch.float64) / 2
    bandit = Bandit(wins)
    expected = torch.log_softmax(bandit.reference + wins.mean(1) / beta, 0)
    torch.testing.assert_close(bandit.optimum(make("ipo", beta=beta)), expected, rtol=0, atol=1e-10)


def test_a_large_beta_gives_the_reference_back():
    bandit = Bandit.bradley_terry(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(bandit.optimum(make("ipo", beta=1e9)), bandit.reference, rtol=0, atol=1e-8)


def test_deterministic_preferences_leave_the_margins_finite():
    """Where the same labels drive DPO without end."""
    order = torch.tensor([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]], dtype=torch.float64)
    bandit = Bandit(order)
    ratios = bandit.optimum(make("ipo", beta=0.5)) - bandit.reference
    assert (ratios - ratios[2]).tolist() == pytest.approx([4 / 3, 2 / 3, 0], abs=1e-10)
    assert gradients(make("dpo", beta=0.5), [600.0], [0.0])[0][0] < 0


def test_is_the_regression_on_sampled_labels_up_to_a_constant():
    """Equation 13: (h - I / beta)^2, averaged over the pair with I = 1 and the swapped pair with I = 0."""
    beta, h = 0.4, torch.tensor([-2.0, 0.0, 1.3, 50.0], dtype=torch.float64)
    sampled = ((h - 1 / beta) ** 2 + (-h) ** 2) / 2
    found = values(make("ipo", beta=beta), h.tolist(), [0.0] * 4)
    torch.testing.assert_close(sampled, found + 1 / (4 * beta**2), rtol=1e-13, atol=0)


# ---- soft labels -----------------------------------------------------------------------------------------------------


def test_certain_labels_are_plain_ipo_to_the_last_bit():
    loss = make("ipo")
    assert torch.equal(values(loss, CHOSEN, REJECTED, preference=[1.0] * 8), values(loss, CHOSEN, REJECTED))
    assert torch.equal(values(loss, CHOSEN, REJECTED, preference=[0.0] * 8), values(loss, REJECTED, CHOSEN))


def test_a_soft_label_is_the_mean_over_flips():
    a, b, p = [3.0, -7.0, 0.2], [1.0, 2.0, 0.0], torch.tensor([0.9, 0.25, 0.5], dtype=torch.float64)
    mean = p * values(make("ipo"), a, b) + (1 - p) * values(make("ipo"), b, a)
    torch.testing.assert_close(values(make("ipo"), a, b, preference=p.tolist()), mean, rtol=1e-14, atol=0)


def test_a_column_of_another_precision_does_not_change_that_of_the_values():
    micro = single_tokens([3.0], [1.0], dtype=torch.float32)
    micro.columns["preference"] = torch.tensor([0.8], dtype=torch.float64)
    assert run(make("ipo"), micro).loss.dtype == torch.float32


def test_a_soft_label_has_its_own_target():
    """(2 p - 1) / (2 beta)."""
    (at,), _ = gradients(make("ipo", beta=0.25), [0.6 * 2], [0.0], preference=[0.8])
    assert at == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("value", [-0.1, 1.1, 70, math.nan])
def test_a_preference_that_is_no_probability_is_refused(value):
    assert f"`preference` is {value}" in make("ipo").row_problem({"preference": value})
    assert make("ipo").row_problem({"preference": 0.3}) == make("ipo").row_problem({}) == ""


# ---- knobs and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `ipo` takes a number above 0, not"):
        make("ipo", beta=value)


def test_an_unknown_length_is_refused():
    with pytest.raises(RecipeError, match=r"loss\.length: `ipo` takes one of mean \| sum, not 'max'"):
        make("ipo", length="max")


def test_metrics_and_defaults():
    assert (make("ipo").beta, make("ipo").length) == (0.1, "mean")
    found = run(make("ipo", beta=0.5), spelled([[-1.0, -3.0]], [[-4.0, -4.0, -4.0]], reference=-3.0)).metrics
    assert {name: found[name].item() for name in ("rewards/chosen", "rewards/rejected", "regressed_margin")} == {
        "rewards/chosen": 1.0,
        "rewards/rejected": -1.5,
        "regressed_margin": 2.0,
    }
    assert metrics(make("ipo", length="sum"), [3.0], [1.0])["regressed_margin"] == [2.0]
