"""SLiC-HF: the hinge, the target, and that no reference is read."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError, UserError
from prefopt.losses import Needs, Pairs, make
from prefopt.losses.views import UndeclaredColumn
from prefopt.scoring.scores import MissingStatistic, TokenScores
from tests.losses.facts import Facts
from tests.losses.theory import spelled, token_gradients
from tests.losses.views import Micro, run

FACTS = Facts(more_than_the_margin=True)

CHOSEN = [[-1.0, -0.5], [-2.0, -2.0], [-0.25]]
REJECTED = [[-2.0], [-1.0], [-3.0, -0.5]]
# Sums -1.5, -4, -0.25 against -2, -1, -3.5: margins 0.5, -3, 3.25.


def values(loss, chosen=CHOSEN, rejected=REJECTED, reference=None):
    return run(loss, spelled(chosen, rejected, reference)).loss.detach()


def test_by_hand():
    loss = make("slic", delta=1.0, target_weight=0.1)
    assert values(loss).tolist() == pytest.approx([0.5 + 0.15, 4.0 + 0.4, 0.0 + 0.025], rel=1e-14)


def test_the_target_per_token():
    loss = make("slic", delta=1.0, target_weight=0.5, target_length="mean")
    assert values(loss).tolist() == pytest.approx([0.5 + 0.375, 4.0 + 1.0, 0.0 + 0.125], rel=1e-14)
    assert token_gradients(loss, spelled([[-1.0, -2.0]], [[-500.0]])) == [-0.25, -0.25, 0.0]


def test_the_hinge_has_slope_one_below_the_margin_and_none_from_there_on():
    loss = make("slic", delta=1.0, target_weight=0)
    margins = [[-2.0], [-0.5], [-1.0], [-1000.0]]
    slopes = token_gradients(loss, spelled(margins, [[-2.0], [-2.0], [-2.0], [-2.0]]))
    assert slopes == [-1.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 1.0]


def test_a_met_margin_costs_nothing():
    loss = make("slic", delta=1.0, target_weight=0)
    assert values(loss, [[-1.0], [-0.5]], [[-2.0], [-2.0]]).tolist() == [0.0, 0.0]


def test_without_a_target_a_common_shift_changes_nothing():
    loss = make("slic", target_weight=0)
    shifted = [[[token - 4.0 for token in answer] for answer in side] for side in ([[-1.0], [-2.5]], [[-1.5], [-1.0]])]
    assert torch.equal(values(loss, [[-1.0], [-2.5]], [[-1.5], [-1.0]]), values(loss, *shifted))


def test_far_from_the_hinge_the_target_alone_is_left():
    """Supervised training on the chosen answer, at the rate of its weight, however wide the margin."""
    loss = make("slic", target_weight=0.3)
    micro = spelled([[-1.0, -2.0]], [[-500.0]])
    assert run(loss, micro).loss.item() == pytest.approx(0.9, rel=1e-14)
    assert token_gradients(loss, micro) == [-0.3, -0.3, 0.0]


def test_a_pair_short_of_its_margin_gets_both_pushes():
    assert token_gradients(make("slic", target_weight=0.3), spelled([[-1.0, -2.0]], [[-1.0]])) == [-1.3, -1.3, 1.0]


def test_is_convex_in_the_two_likelihoods():
    loss = make("slic", delta=0.7, target_weight=0.2)
    rng = torch.Generator().manual_seed(1)
    one, other = -5 * torch.rand(2, 2, 200, generator=rng, dtype=torch.float64)

    def at(sides):
        return values(loss, *([[logp] for logp in side] for side in sides.tolist()))

    assert (at((one + other) / 2) <= (at(one) + at(other)) / 2 + 1e-12).all()


def test_reads_no_reference():
    loss = make("slic")
    assert loss.needs.reference == "none"
    assert torch.equal(values(loss, reference=-1.0), values(loss, reference=-9.0))
    with pytest.raises(MissingStatistic, match="ref_logp"):
        spelled(CHOSEN, REJECTED, -1.0).view(loss.needs).chosen.log_ratio()


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_unlike_dpo_its_value_at_the_reference_depends_on_the_policy(shift):
    """Which is why it is no loss of log-ratios."""
    at_reference = [spelled([[-1.0 - shift]], [[-2.0]], reference=None)]
    assert [run(make("slic", delta=2.0, target_weight=0), micro).loss.item() for micro in at_reference] == [1.0 + shift]


def with_targets(targets, chosen=CHOSEN, rejected=REJECTED):
    """Pairs whose targets have these log-probs token by token."""
    micro, third = spelled(chosen, rejected), spelled(targets, [])
    rows, tokens = len(chosen), third.sides.tokens
    logp = torch.cat([micro.scores.logp, third.scores.logp]).detach().requires_grad_()
    sequence = torch.cat([micro.scores.sequence, third.scores.sequence + 2 * rows])
    sides = micro.sides._replace(target_size=rows, target_tokens=tokens)
    return Micro(TokenScores(3 * rows, sequence, logp), sides, {})


def test_a_target_of_its_own_by_hand():
    micro = with_targets([[-1.0], [-0.5, -1.5, -2.0], [-8.0]])
    sums = run(make("slic", delta=1.0, target_weight=0.5), micro)
    assert sums.loss.tolist() == pytest.approx([0.5 + 0.5, 4.0 + 2.0, 0.0 + 4.0], rel=1e-14)
    assert sums.metrics["target_nll"].tolist() == [1.0, 4.0, 8.0]
    means = run(make("slic", delta=1.0, target_weight=0.3, target_length="mean"), micro)
    assert means.loss.tolist() == pytest.approx([0.5 + 0.3, 4.0 + 0.4, 0.0 + 2.4], rel=1e-14)


def test_a_target_of_its_own_is_raised_in_the_place_of_the_chosen_answer():
    micro = with_targets([[-1.0], [-0.5], [-2.0]], [[-1.0], [-1.0], [-1.0]], [[-9.0], [-9.0], [-0.5]])
    slopes = token_gradients(make("slic", target_weight=0.3), micro)
    assert slopes == [0.0, 0.0, -1.0, 0.0, 0.0, 1.0, -0.3, -0.3, -0.3]


@pytest.mark.parametrize("length", ["sum", "mean"])
def test_a_target_that_is_the_chosen_answer_changes_nothing(length):
    loss = make("slic", target_length=length)
    assert torch.equal(run(loss, with_targets(CHOSEN)).loss.detach(), values(loss))


def test_a_loss_that_declares_no_target_cannot_read_it():
    view = with_targets(CHOSEN).view(make("simpo").needs)
    with pytest.raises(UndeclaredColumn, match="`target` was read but not declared"):
        _ = view.target
    assert spelled(CHOSEN, REJECTED).view(make("slic").needs).target is None


def test_by_hand_a_target_is_an_answer_of_the_pairs():
    micro = with_targets(CHOSEN[::-1])
    view = micro.view(make("slic").needs)
    pairs = Pairs(view.chosen, view.rejected, answers={"target": view.target})
    assert torch.equal(make("slic")(pairs).loss, run(make("slic"), micro).loss)
    with pytest.raises(ValueError, match="2 completions in `target` for 3 pairs"):
        Pairs(view.chosen, view.rejected, answers={"target": view.target.slice(slice(0, 2), slice(0, 3))})


def test_a_target_goes_with_pairs():
    with pytest.raises(UserError, match="`target` is an answer beside the two of a pair"):
        Needs(view="completions", optional_columns=("target",))


@pytest.mark.parametrize("knob", ["delta", "target_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_knobs_outside_their_range_are_refused(knob, value):
    with pytest.raises(RecipeError, match=rf"loss\.{knob}: `slic` takes a number at least 0, not"):
        make("slic", **{knob: value})
    assert getattr(make("slic", **{knob: 0}), knob) == 0


def test_metrics_and_defaults():
    assert (make("slic").delta, make("slic").target_weight, make("slic").target_length) == (1.0, 0.1, "sum")
    micro = spelled(CHOSEN, REJECTED)
    found = {name: value.tolist() for name, value in run(make("slic", delta=0.5), micro).metrics.items()}
    assert found["margin_met"] == [1.0, 0.0, 1.0]
    assert run(make("slic", delta=0.75), micro).metrics["margin_met"].tolist() == [0.0, 0.0, 1.0]
    assert found["target_nll"] == [1.5, 4.0, 0.25]
    assert found["rewards/chosen"] == [-1.5, -4.0, -0.25]
    assert found["rewards/rejected"] == [-2.0, -1.0, -3.5]
