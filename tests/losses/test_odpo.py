"""ODPO: the offset in its three forms and as a column, ties and contradictions, and DPO as its limit."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores
from tests.losses.facts import Facts
from tests.losses.theory import Bandit, exact, gradients, metrics, sigmoid, values
from tests.losses.views import random_micro, run, single_tokens, take_rows

FACTS = Facts(at_the_reference=math.log(2))  # scores one apart: the logarithm of the gap is 0

RATIOS = [(-40.0, 3.0), (-1.5, 0.25), (0.0, 0.0), (6.0, 50.0), (300.0, -2.0)]
CHOSEN, REJECTED = zip(*RATIOS, strict=True)
SCORES = {"score_chosen": [3.0, 0.5, 7.0, 0.75, 4.0], "score_rejected": [1.0, 0.25, 2.0, 0.5, 3.0]}
GAPS = [2.0, 0.25, 5.0, 0.25, 1.0]

OFFSETS = {
    "log": [math.log(gap) for gap in GAPS],
    "identity": GAPS,
    "log_ratio": [math.log(3), math.log(2), math.log(3.5), math.log(1.5), math.log(4 / 3)],
}


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("f", OFFSETS)
@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.7, 0.5), (0.05, 3.0)])
def test_agrees_with_exact_arithmetic(f, beta, alpha, dtype, tolerance):
    found = values(make("odpo", beta=beta, alpha=alpha, f=f), CHOSEN, REJECTED, dtype, **SCORES)
    for value, (a, b), offset in zip(found.tolist(), RATIOS, OFFSETS[f], strict=True):
        assert value == pytest.approx(exact(beta * (a - b) - alpha * offset), rel=tolerance)


def test_a_value_by_hand():
    """beta 0.5, h = 2, scores 5 and 2: log(1 + 3 e^-1)."""
    found = values(make("odpo", beta=0.5), [3.0], [1.0], score_chosen=[5.0], score_rejected=[2.0])
    assert found.item() == pytest.approx(math.log(1 + 3 / math.e), rel=1e-14)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_log_form_is_a_weighted_exponential(alpha):
    """log(1 + gap^alpha e^(-beta h))."""
    a, b = [-3.0, 0.5, 2.0], [1.0, 0.0, -4.0]
    loss = make("odpo", beta=0.4, alpha=alpha)
    found = values(loss, a, b, score_chosen=[0.3, 4.0, 20.0], score_rejected=[0.1, 3.5, 1.0])
    expected = [
        math.log(1 + gap**alpha * math.exp(-0.4 * (x - y))) for x, y, gap in zip(a, b, (0.2, 0.5, 19.0), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_an_offset_of_nothing_is_dpo_to_the_last_bit():
    dpo = values(make("dpo"), CHOSEN, REJECTED)
    ones, zeros, same = [1.0] * 5, [0.0] * 5, [2.5] * 5
    assert torch.equal(values(make("odpo"), CHOSEN, REJECTED, score_chosen=ones, score_rejected=zeros), dpo)
    assert torch.equal(values(make("odpo"), CHOSEN, REJECTED, offset=zeros), dpo)
    assert torch.equal(values(make("odpo", alpha=0), CHOSEN, REJECTED, **SCORES), dpo)
    for f in ("identity", "log_ratio"):
        tied = values(make("odpo", f=f), CHOSEN, REJECTED, score_chosen=same, score_rejected=same)
        assert torch.equal(tied, dpo)


@pytest.mark.parametrize("f", OFFSETS)
@pytest.mark.parametrize("scores", [(2.0, 2.0), (-1.0, -1.0), (1.0, 3.0), (0.0, 0.0)])
def test_alpha_0_is_dpo_whatever_the_scores(f, scores):
    """Also where the logarithm of a tie would be multiplied by 0."""
    loss, columns = make("odpo", alpha=0, f=f), {"score_chosen": [scores[0]], "score_rejected": [scores[1]]}
    assert torch.equal(values(loss, [3.0], [1.0], **columns), values(make("dpo"), [3.0], [1.0]))
    assert loss.row_problem(dict(score_chosen=scores[0], score_rejected=scores[1])) == ""
    assert "alpha 0" in loss.notes()[0] and "dpo" in loss.notes()[0]
    assert make("odpo").notes() == ()


def test_the_loss_is_ln_2_where_the_scaled_margin_is_the_offset():
    assert values(make("odpo", beta=0.5), [5.0], [1.0], offset=[2.0]).item() == math.log(2)


def test_an_offset_is_a_shift_of_the_margin():
    shifted = [a - 1.5 / 0.3 for a in CHOSEN]
    found = values(make("odpo", beta=0.3), CHOSEN, REJECTED, offset=[1.5] * 5)
    torch.testing.assert_close(found, values(make("dpo", beta=0.3), shifted, REJECTED), rtol=1e-11, atol=0)


@pytest.mark.parametrize("offset", [-3.0, 0.0, 2.0])
def test_gradient_is_that_of_the_formula(offset):
    (chosen,), (rejected,) = gradients(make("odpo", beta=0.2), [3.0], [-1.0], offset=[offset])
    assert chosen == -rejected
    assert chosen == pytest.approx(-0.2 * sigmoid(offset - 0.2 * 4), rel=1e-13)


@pytest.mark.parametrize("f", OFFSETS)
def test_a_wider_gap_costs_more(f):
    columns = {"score_chosen": [1.5, 2.0, 3.0, 9.0], "score_rejected": [1.0] * 4}
    assert (values(make("odpo", f=f), [1.0] * 4, [0.0] * 4, **columns).diff() > 0).all()


def test_scaling_the_scores_adds_to_the_log_offset():
    scaled = {name: [3.0 * value for value in column] for name, column in SCORES.items()}
    offsets = [0.5 * math.log(3 * gap) for gap in GAPS]
    assert metrics(make("odpo", alpha=0.5), CHOSEN, REJECTED, **scaled)["offset"] == pytest.approx(offsets, rel=1e-13)


def test_scores_stay_with_their_rows():
    micro = random_micro(columns=("score_chosen", "score_rejected"))
    order = [2, 0, 3, 1]
    assert torch.equal(run(make("odpo"), take_rows(micro, order)).loss, run(make("odpo"), micro).loss[order])


@pytest.mark.parametrize("names", [["score_chosen", "score_rejected"], ["offset"]])
def test_columns_of_another_precision_do_not_change_that_of_the_values(names):
    micro = single_tokens([3.0], [1.0], dtype=torch.float32)
    micro.columns.update({name: torch.tensor([2.0], dtype=torch.float64) for name in names})
    assert run(make("odpo"), micro).loss.dtype == torch.float32


def test_the_logarithm_of_a_column_is_taken_in_the_precision_of_the_scores():
    """Columns travel in single precision."""
    micro = single_tokens([3.0], [1.0])
    micro.columns.update({"score_chosen": torch.tensor([2.5]), "score_rejected": torch.tensor([0.75])})
    for f, offset in {"log": math.log(1.75), "log_ratio": math.log(2.5 / 0.75)}.items():
        assert run(make("odpo", f=f), micro).loss.item() == pytest.approx(exact(0.2 - offset), rel=1e-14)


def test_no_gradient_reaches_the_scores():
    scores = [torch.tensor([value], requires_grad=True) for value in (3.0, 1.0)]
    sides = [TokenScores(1, torch.tensor([0]), torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0]))] * 2
    for columns in (dict(zip(("score_chosen", "score_rejected"), scores, strict=True)), {"offset": scores[0]}):
        make("odpo")(Pairs(*sides, columns)).loss.sum().backward()
        assert [score.grad for score in scores] == [None, None]


# ---- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wins", [0.7, 0.95])
def test_the_optimum_balances_the_two_orders(wins):
    """p S(D - beta h) = (1 - p) S(D + beta h) when both orders of a pair carry the same offset D."""
    beta, offset = 0.4, 0.8
    bandit = Bandit(torch.tensor([[0.5, wins], [1 - wins, 0.5]], dtype=torch.float64))
    ratios = bandit.optimum(make("odpo", beta=beta), offset=torch.full((2, 2), offset, dtype=torch.float64))
    z = beta * ((ratios - bandit.reference)[0] - (ratios - bandit.reference)[1]).item()
    assert wins * sigmoid(offset - z) == pytest.approx((1 - wins) * sigmoid(offset + z), rel=1e-8)


def test_is_the_likelihood_of_winning_by_more_than_the_offset():
    """With Gumbel noise on both rewards; a million draws."""
    noise = -torch.log(
        -torch.log(torch.rand(2, 1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    )
    share = (1.2 + noise[0] - 0.4 - noise[1] > 0.5).double().mean().item()
    found = values(make("odpo", beta=1.0), [1.2], [0.4], offset=[0.5]).item()
    assert math.exp(-found) == pytest.approx(share, abs=2e-3)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_small_gaps_are_held_at_the_floor_and_counted():
    columns = {"score_chosen": [2.0, 1.0005, 0.001, 3.0, 1.0], "score_rejected": [2.0, 1.0, 0.0, 1.0, 4.0]}
    found = run(make("odpo"), single_tokens([0.0] * 5, [0.0] * 5, columns=columns)).metrics
    assert found["score_ties"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert found["offset_floored"].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert found["offset"].tolist() == pytest.approx([math.log(1e-3)] * 3 + [math.log(2), math.log(1e-3)], rel=1e-12)
    assert all(found[name].dtype == torch.float64 for name in ("score_ties", "offset_floored", "offset"))


def test_a_tie_still_pulls_a_little():
    (tied,), _ = gradients(make("odpo", beta=0.1), [0.0], [0.0], score_chosen=[2.0], score_rejected=[2.0])
    assert tied == pytest.approx(-0.1 * 1e-3 / (1 + 1e-3), rel=1e-12)


@pytest.mark.parametrize("f", ["identity", "log_ratio"])
def test_nothing_is_floored_where_a_small_gap_has_a_value(f):
    found = metrics(make("odpo", f=f), [0.0], [0.0], score_chosen=[1.0], score_rejected=[1.0])
    assert found["score_ties"] == [1.0] and "offset_floored" not in found


@pytest.mark.parametrize(
    ("knobs", "columns", "words"),
    [
        ({}, {}, "give each row `score_chosen` and `score_rejected`, or `offset`"),
        ({}, {"score_chosen": 1.0}, "`score_chosen` and `score_rejected`, or `offset`"),
        ({}, {"score_rejected": 1.0}, "`score_chosen` and `score_rejected`, or `offset`"),
        ({"alpha": 0}, {}, "`score_chosen` and `score_rejected`, or `offset`"),
        (
            {},
            {"score_chosen": 1.0, "score_rejected": 2.0},
            "`score_chosen` is 1.0 and `score_rejected` 2.0: they contr",
        ),
        ({"f": "log_ratio"}, {"score_chosen": 1.0, "score_rejected": 0.0}, "wants both above 0"),
        ({"f": "log_ratio"}, {"score_chosen": 0, "score_rejected": 1}, "wants both above 0"),
        ({"f": "log_ratio"}, {"score_chosen": -1.0, "score_rejected": -2.0}, "wants both above 0"),
        ({"alpha": 0.5}, {"offset": 1.0}, "alpha and f must keep their defaults"),
        ({"f": "identity"}, {"offset": 1.0}, "alpha and f must keep their defaults"),
        ({}, {"offset": 1.0}, ""),
        ({}, {"offset": -1.0, "score_chosen": 1.0, "score_rejected": 2.0}, ""),
        ({}, {"score_chosen": 2.0, "score_rejected": 2.0}, ""),
        ({}, {"score_chosen": -2, "score_rejected": -3}, ""),
        ({"alpha": 0}, {"score_chosen": 1.0, "score_rejected": 2.0}, ""),
        ({"f": "identity"}, {"score_chosen": 1.0, "score_rejected": 2.0}, "they contradict the label"),
        ({"f": "log_ratio"}, {"score_chosen": 1.0, "score_rejected": 2.0}, "they contradict the label"),
    ],
)
def test_rows_that_have_no_offset_are_refused(knobs, columns, words):
    problem = make("odpo", **knobs).row_problem(columns)
    assert words in problem and bool(problem) == bool(words)


def test_an_offset_column_goes_before_the_scores():
    both = {**SCORES, "offset": [0.5] * 5}
    alone = values(make("odpo"), CHOSEN, REJECTED, offset=[0.5] * 5)
    assert torch.equal(values(make("odpo"), CHOSEN, REJECTED, **both), alone)


# ---- knobs and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "value", "range"),
    [
        ("alpha", -0.1, "a number at least 0"),
        ("alpha", math.nan, "a number at least 0"),
        ("beta", 0, "a number above 0"),
        ("beta", math.nan, "a number above 0"),
        ("f", "sqrt", r"one of log \| identity \| log_ratio"),
    ],
)
def test_knobs_outside_their_range_are_refused(knob, value, range):
    with pytest.raises(RecipeError, match=rf"loss\.{knob}: `odpo` takes {range}, not"):
        make("odpo", **{knob: value})


def test_metrics_and_defaults():
    assert (make("odpo").beta, make("odpo").alpha, make("odpo").f) == (0.1, 1.0, "log")
    found = metrics(make("odpo", beta=0.5), [5.0, 1.0, 4.0], [1.0, 0.0, 0.0], offset=[2.0, 1.0, 0.0])
    assert found["margin_met"] == [1.0, 0.0, 1.0]
    assert found["offset"] == [2.0, 1.0, 0.0]
    assert "score_ties" not in found
    assert (found["rewards/chosen"], found["rewards/rejected"]) == ([2.5, 0.5, 2.0], [0.5, 0.0, 0.0])
