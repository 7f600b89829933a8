"""SimPO: mean log-likelihoods, the margin in both spellings, and that no reference is read."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores
from prefopt.scoring.scores import MissingStatistic
from tests.losses.facts import Facts
from tests.losses.theory import exact, sigmoid, spelled, token_gradients
from tests.losses.views import run

FACTS = Facts(per_token=True)

CHOSEN = [[-1.0, -0.5], [-2.0, -2.5, -3.0], [-0.25]]
REJECTED = [[-2.0], [-1.0], [-3.0, -0.5]]
MEANS = [(-0.75, -2.0), (-2.5, -1.0), (-0.25, -1.75)]


def values(loss, chosen=CHOSEN, rejected=REJECTED, reference=None):
    return run(loss, spelled(chosen, rejected, reference)).loss.detach()


@pytest.mark.parametrize(("beta", "ratio"), [(2.0, 0.5), (10.0, 0.3), (2.5, 0.0)])
def test_agrees_with_exact_arithmetic(beta, ratio):
    expected = [exact(beta * (m_w - m_l - ratio)) for m_w, m_l in MEANS]
    assert values(make("simpo", beta=beta, gamma_beta_ratio=ratio)).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_value_by_hand():
    """Means -1 and -2 at beta 2, ratio 0.5: the argument is 2 (1 - 0.5) = 1, so log(1 + e^-1)."""
    assert values(make("simpo"), [[-0.5, -1.5]], [[-2.0]]).item() == pytest.approx(0.3132616875, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.25])
def test_the_loss_is_ln_2_where_the_means_differ_by_the_margin(ratio):
    loss = make("simpo", beta=3.0, gamma_beta_ratio=ratio)
    assert values(loss, [[-1.0]], [[-1.0 - ratio]]).item() == math.log(2)


def test_gradient_of_a_token_is_over_the_length_of_its_answer():
    slopes = token_gradients(make("simpo"), spelled([[-1.0, -1.0, -1.0, -1.0]], [[-1.5, -1.5]]))
    push = 2.0 * sigmoid(-2.0 * (0.5 - 0.5))
    assert slopes == pytest.approx([-push / 4] * 4 + [push / 2] * 2, rel=1e-14)


def test_repeating_every_token_changes_nothing():
    doubled = [[[token for token in answer for _ in range(2)] for answer in side] for side in (CHOSEN, REJECTED)]
    torch.testing.assert_close(values(make("simpo"), *doubled), values(make("simpo")), rtol=1e-14, atol=0)


def test_the_margin_is_a_shift():
    shifted = [[token - 0.5 for token in answer] for answer in CHOSEN]
    plain = values(make("simpo", gamma_beta_ratio=0), shifted)
    torch.testing.assert_close(values(make("simpo", gamma_beta_ratio=0.5)), plain, rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_equal_lengths_without_a_margin_are_dpo_under_a_uniform_reference(n):
    sides = [[-0.5] * n, [-2.0] * n], [[-1.0] * n, [-0.25] * n]
    dpo = values(make("dpo", beta=0.6 / n), *sides, reference=-3.0)
    torch.testing.assert_close(values(make("simpo", beta=0.6, gamma=0), *sides), dpo, rtol=1e-13, atol=0)


def test_a_wider_margin_costs_more():
    found = [values(make("simpo", gamma_beta_ratio=ratio)) for ratio in (0, 0.25, 1.0)]
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all()


def test_of_two_answers_as_likely_the_longer_one_is_preferred():
    loss = make("simpo")
    assert values(loss, [[-1.0] * 4], [[-4.0]]).item() < exact(-2.0 * 0.5) < values(loss, [[-4.0]], [[-1.0] * 4]).item()


def test_token_weights_weigh_the_mean():
    sequence, weight = torch.zeros(2, dtype=torch.int64), torch.tensor([3.0, 1.0])
    chosen = TokenScores(1, sequence, torch.tensor([-1.0, -2.0]), token_weight=weight)
    rejected = TokenScores(1, sequence, torch.tensor([-1.0, -2.0]))
    margin = make("simpo", gamma=0)(Pairs(chosen, rejected)).metrics["rewards/margins"].item()
    assert margin == pytest.approx(2.0 * (-1.25 + 1.5))


def test_reads_no_reference():
    loss = make("simpo")
    assert loss.needs.reference == "none"
    assert torch.equal(values(loss, reference=-1.0), values(loss, reference=-9.0))
    with pytest.raises(MissingStatistic, match="ref_logp"):
        spelled(CHOSEN, REJECTED, -1.0).view(loss.needs).chosen.log_ratio()


# ---- the two spellings of the margin ---------------------------------------------------------------------------------


def test_gamma_is_beta_times_the_ratio():
    assert torch.equal(
        values(make("simpo", beta=4.0, gamma=1.0)), values(make("simpo", beta=4.0, gamma_beta_ratio=0.25))
    )


@pytest.mark.parametrize("knobs", [{}, {"gamma_beta_ratio": None}, {"gamma": None}])
def test_the_ratio_is_one_half_when_neither_is_written(knobs):
    loss = make("simpo", **knobs)
    assert (loss.beta, loss.gamma_beta_ratio, loss.gamma) == (2.0, 0.5, None)


def test_gamma_alone_leaves_the_ratio_open():
    assert make("simpo", gamma=1.4).gamma_beta_ratio is None


@pytest.mark.parametrize(("ratio", "gamma"), [(0.5, 0.5), (0.5, 0), (0, 1.0), (0.7, 1.41)])
def test_contradicting_spellings_are_refused(ratio, gamma):
    with pytest.raises(RecipeError, match=r"loss\.gamma: .* is not beta times gamma_beta_ratio .* Write one"):
        make("simpo", gamma_beta_ratio=ratio, gamma=gamma)


@pytest.mark.parametrize(("beta", "ratio", "gamma"), [(2.0, 0.5, 1.0), (3.0, 0.1, 0.3), (2.0, 0, 0)])
def test_agreeing_spellings_are_taken(beta, ratio, gamma):
    both = make("simpo", beta=beta, gamma_beta_ratio=ratio, gamma=gamma)
    torch.testing.assert_close(values(both), values(make("simpo", beta=beta, gamma=gamma)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("knob", ["gamma", "gamma_beta_ratio"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_margins_outside_their_range_are_refused(knob, value):
    with pytest.raises(RecipeError, match=rf"loss\.{knob}: `simpo` takes a number at least 0, or null, not"):
        make("simpo", **{knob: value})


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_beta_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"loss\.beta: `simpo` takes a number above 0, not"):
        make("simpo", beta=value)


def test_rewards_are_scaled_means():
    metrics = run(make("simpo", beta=4.0), spelled(CHOSEN, REJECTED)).metrics
    assert metrics["rewards/chosen"].tolist() == [-3.0, -10.0, -1.0]
    assert metrics["rewards/rejected"].tolist() == [-8.0, -4.0, -7.0]
    assert metrics["logps/chosen"].tolist() == [-1.5, -7.5, -0.25]
