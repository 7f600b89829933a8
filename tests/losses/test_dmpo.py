"""DMPO: the two weights of a turn, their limits, and which of them is the corollary's. arXiv 2406.14868."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from prefopt.losses.functional import discounted_turns
from tests.losses.facts import Facts
from tests.losses.turns import conversation, flat_gradient
from tests.losses.views import run
from tests.oracle.float64 import L

GAMMAS = [0.0, 0.3, 0.7, 0.99, 1.0]
FORMS = ["occupancy", "phi"]


def weight(t, turns, gamma, form):
    """As printed in the paper (phi), and times gamma^t, as its eq. 15 put into eq. 14 gives (occupancy)."""
    if gamma == 1:
        return (turns - t) / turns
    phi = (1 - gamma ** (turns - t)) / (1 - gamma**turns)
    return phi * gamma**t if form == "occupancy" else phi


def weighted_ratio(answer, gamma, form):
    turns = 1 if answer.turn is None else max(answer.turn) + 1
    return answer.ratio_of_turns(lambda t: weight(t, turns, gamma, form))


def formula(pair, beta=0.1, gamma=0.7, turn_weight="occupancy"):
    chosen, rejected = (weighted_ratio(side, gamma, turn_weight) for side in (pair.chosen, pair.rejected))
    return L(beta * (chosen - rejected))


def reward(answer, beta=0.1, gamma=0.7, turn_weight="occupancy"):
    return beta * weighted_ratio(answer, gamma, turn_weight)


FACTS = Facts(
    at_the_reference=math.log(2),
    formula=formula,
    knobs=[{"gamma": gamma, "turn_weight": form} for gamma in (0.0, 0.4, 1.0) for form in FORMS] + [{"beta": 0.6}],
    reward=reward,
)

CHOSEN = [[0.5, -1.0], [2.0], [0.25, 0.75]]
REJECTED = [[-0.5], [1.0, 0.5]]


def weights(turns: int, gamma: float, form: str) -> list[float]:
    """The weight of each of so many turns, one token each."""
    scores = conversation([[0.0]] * turns, [[0.0]]).scores.slice(slice(0, 1), slice(0, turns))
    return discounted_turns(scores, gamma, form).token_weight.tolist()


def test_by_hand():
    """gamma 1/2: three turns weigh 1, 3/7, 1/7 by occupancy and 1, 6/7, 4/7 by phi; two turns 1, 1/3 and 1, 2/3."""
    margins = {
        "occupancy": (-0.5 + 2.0 * 3 / 7 + 1.0 / 7) - (-0.5 + 1.5 / 3),
        "phi": (-0.5 + 2.0 * 6 / 7 + 4 / 7) - (-0.5 + 1.5 * 2 / 3),
    }
    for form, margin in margins.items():
        found = run(make("dmpo", gamma=0.5, turn_weight=form), conversation(CHOSEN, REJECTED)).loss.item()
        assert found == pytest.approx(math.log1p(math.exp(-0.1 * margin)), rel=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_turn_weighs_one_and_no_turn_more_than_the_one_before(form):
    for turns, gamma in itertools.product((1, 2, 5, 20), GAMMAS):
        found = weights(turns, gamma, form)
        assert found[0] == 1.0
        assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_turn_is_dpo(form, gamma):
    pair = conversation([[0.5, -1.0]], [[2.0]])
    loss = make("dmpo", gamma=gamma, turn_weight=form)
    assert torch.equal(run(loss, pair).loss, run(make("dpo"), pair).loss)


def test_at_gamma_zero_occupancy_is_the_first_turns_dpo_and_phi_is_eto():
    """The corollary of the paper holds for the weight of the authors' code, not for the printed one."""
    pair, first = conversation(CHOSEN, REJECTED), conversation([CHOSEN[0]], [REJECTED[0]])
    at_zero = {form: run(make("dmpo", gamma=0.0, turn_weight=form), pair).loss.item() for form in FORMS}
    assert at_zero["occupancy"] == pytest.approx(run(make("dpo"), first).loss.item(), rel=1e-14)
    assert at_zero["phi"] == pytest.approx(run(make("eto"), pair).loss.item(), rel=1e-14)
    slopes = flat_gradient(make("dmpo", gamma=0.0), pair)
    assert (slopes != 0).tolist() == [True, True, False, False, False, True, False, False]
    near = run(make("dmpo", gamma=1e-9), pair).loss.item()
    assert near == pytest.approx(at_zero["occupancy"], abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_at_gamma_one_both_are_linear_in_the_turn(form):
    assert weights(4, 1.0, form) == [1.0, 0.75, 0.5, 0.25]
    assert weights(4, 1.0 - 1e-9, form) == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_a_swap_of_equally_long_sides_turns_the_margin(form):
    loss = make("dmpo", turn_weight=form)
    pair, swapped = conversation(CHOSEN, [*REJECTED, [1.0]]), conversation([*REJECTED, [1.0]], CHOSEN)
    margins = [run(loss, each).metrics["rewards/margins"].item() for each in (pair, swapped)]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-14) and margins[0]


def test_each_side_is_weighed_by_its_own_number_of_turns():
    """The last of two turns weighs gamma / (1 + gamma), that of three gamma^2 / (1 + gamma + gamma^2)."""
    slopes = flat_gradient(make("dmpo", gamma=0.5), conversation([[0.0]] * 3, [[0.0]] * 2))
    relative = (slopes / slopes[0]).tolist()
    assert relative == pytest.approx([1.0, 3 / 7, 1 / 7, -1.0, -1 / 3], rel=1e-13)


def test_the_weights_of_the_segment_say_the_same():
    """Occupancy as turn weights of segment_dpo."""
    given = ([1.0, 3 / 7, 1 / 7], [1.0, 1 / 3])
    as_segment = run(make("segment_dpo"), conversation(CHOSEN, REJECTED, segments=given)).loss
    assert as_segment.item() == pytest.approx(
        run(make("dmpo", gamma=0.5), conversation(CHOSEN, REJECTED)).loss.item(), rel=1e-13
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gamma": -0.1}, "at least 0, at most 1"),
        ({"gamma": 1.1}, "at most 1"),
        ({"turn_weight": "code"}, "occupancy | phi"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(RecipeError, match=message):
        make("dmpo", **knobs)


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_one_batch_are_weighed_each_by_its_own_number_of_turns(form):
    """At the end of the range, where the weight has a formula of its own."""
    short, long = ([[1.0]] * 2, [[0.0]] * 2), ([[1.0]] * 5, [[0.0]] * 5)
    together = run(make("dmpo", gamma=1.0, turn_weight=form), conversation(*short, more=(long,))).metrics
    assert together["rewards/chosen"].tolist() == pytest.approx([0.1 * 1.5, 0.1 * 3.0], rel=1e-14)
