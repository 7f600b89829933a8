"""DPO against its formula in exact arithmetic, and the properties its theory promises."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores
from tests.losses.facts import Facts
from tests.losses.views import Micro, random_micro, run, single_tokens

FACTS = Facts(at_the_reference=math.log(2))

getcontext().prec = 400  # so that 1 + e^-800 is not 1

RATIOS = [
    (-1e4, 1e4),
    (-210.0, 0.0),
    (-80.0, 3.0),
    (-1.5, 0.25),
    (0.0, 0.0),
    (0.7, -0.4),
    (6.0, 50.0),
    (300.0, -2.0),
    (1e4, -1e4),
]


def exact(z: float) -> float:
    """log(1 + e^-z), to the last bit of a float."""
    return float((1 + (-Decimal(z)).exp()).ln())


def values(chosen, rejected, *, beta=0.1, dtype=torch.float64, **columns):
    micro = single_tokens(chosen, rejected, dtype=dtype, columns=columns)
    return run(make("dpo", beta=beta), micro).loss


def gradient(micro: Micro, beta: float) -> torch.Tensor:
    (grad,) = torch.autograd.grad(run(make("dpo", beta=beta), micro).loss.sum(), micro.scores.logp)
    return grad


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance", "tiny"), [(torch.float64, 1e-12, 1e-300), (torch.float32, 1e-5, 1e-30)])
def test_agrees_with_exact_arithmetic(beta, dtype, tolerance, tiny):
    found = values(*zip(*RATIOS, strict=True), beta=beta, dtype=dtype)
    for value, (a, b) in zip(found.tolist(), RATIOS, strict=True):
        assert value == pytest.approx(exact(beta * (a - b)), rel=tolerance, abs=tiny)


def test_sums_weighted_tokens_of_each_answer():
    sequence = torch.tensor([0, 0, 1])
    chosen = TokenScores(2, sequence, torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.5, -3.5]))
    weight = torch.tensor([2.0, 1.0, 1.0])
    logp, ref_logp = torch.tensor([-4.0, -1.0, -1.0]), torch.tensor([-3.0, -2.0, -1.0])
    rejected = TokenScores(2, sequence, logp, ref_logp, token_weight=weight)
    output = make("dpo", beta=0.5)(Pairs(chosen, rejected))
    a, b = [1.5, 0.5], [-2.0 + 1.0, 0.0]
    assert output.loss.tolist() == pytest.approx([exact(0.5 * (x - y)) for x, y in zip(a, b, strict=True)], rel=1e-6)
    assert output.metrics["logps/chosen"].tolist() == [-3.0, -3.0]
    assert output.metrics["logratios/chosen"].tolist() == a
    assert output.metrics["logratios/rejected"].tolist() == b
    assert output.metrics["logratios/margin"].tolist() == [2.5, 0.5]
    assert output.metrics["rewards/chosen"].tolist() == [0.75, 0.25]
    assert output.metrics["rewards/rejected"].tolist() == [-0.5, 0.0]
    assert output.metrics["rewards/margins"].tolist() == [1.25, 0.25]


def test_a_tie_is_no_hit_in_the_accuracy():
    metrics = run(make("dpo"), single_tokens([1.0, 0.0, -1.0], [0.0, 0.0, 0.0])).metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_beta_outside_its_range_is_refused(beta):
    with pytest.raises(RecipeError, match=r"loss\.beta: `dpo` takes a number above 0, not"):
        make("dpo", beta=beta)


# ---- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_equal_models_give_ln_2_and_half_beta(beta):
    micro = single_tokens([0.0], [0.0])
    assert run(make("dpo", beta=beta), micro).loss.item() == math.log(2)
    assert gradient(micro, beta).tolist() == pytest.approx([-beta / 2, beta / 2], rel=1e-15)


@pytest.mark.parametrize(("a", "b"), [(-30.0, 5.0), (0.3, 0.1), (12.0, -9.0)])
def test_gradient_of_the_two_answers_is_opposite_and_as_the_paper_says(a, b):
    chosen, rejected = gradient(single_tokens([a], [b]), 0.2).tolist()
    assert chosen == -rejected
    assert chosen == pytest.approx(-0.2 / (1 + math.exp(0.2 * (a - b))), rel=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_the_optimum_of_a_bandit_is_the_tilted_reference(soft):
    """Bradley-Terry labels on all pairs of eight arms: ref exp(reward / beta) / Z to 1e-8, by Newton's method."""
    beta, arms = 0.4, 8
    rng = torch.Generator().manual_seed(3)
    reward = torch.randn(arms, generator=rng, dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(arms, generator=rng, dtype=torch.float64), 0)
    pairs = [(i, j) for i in range(arms) for j in range(arms) if (i < j if soft else i != j)]
    first, second = torch.tensor(pairs).T
    wins = torch.sigmoid(reward[first] - reward[second])

    def population(logits):
        policy = torch.log_softmax(logits, 0)
        one_each = torch.arange(len(pairs))
        sides = [TokenScores(len(pairs), one_each, policy[arm], reference[arm]) for arm in (first, second)]
        loss = make("dpo", beta=beta)(Pairs(*sides, {"preference": wins} if soft else {})).loss
        return (loss if soft else loss * wins).sum()

    logits = reference.clone()
    for _ in range(30):
        slope = torch.autograd.functional.jacobian(population, logits)
        curvature = torch.autograd.functional.hessian(population, logits)
        logits = logits - torch.linalg.pinv(curvature, rtol=1e-10) @ slope
    optimum = torch.log_softmax(reference + reward / beta, 0)
    torch.testing.assert_close(torch.log_softmax(logits, 0).exp(), optimum.exp(), rtol=0, atol=1e-8)


def test_only_the_margin_matters():
    # Powers of two, so that adding the constant is exact.
    assert torch.equal(values([1.5, -2.0], [0.5, 1.0]), values([1.5 + 64, -2.0 - 8], [0.5 + 64, 1.0 - 8]))


def test_swapping_the_answers_adds_the_margin():
    a, b = [3.0, -1.0, 40.0], [0.5, 2.0, -40.0]
    margin = 0.1 * (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close(values(b, a) - values(a, b), margin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_undisputed_labels_push_the_margin_without_end(beta):
    margins = torch.tensor([0.0, 1.0, 10.0, 100.0, 600.0])
    found = values((margins / beta).tolist(), [0.0] * 5, beta=beta)
    assert (found.diff() < 0).all()
    assert (gradient(single_tokens((margins / beta).tolist(), [0.0] * 5), beta)[:5] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [500.0, -500.0, 1e6, -1e6])
def test_extreme_margins_are_finite(margin, dtype):
    micro = single_tokens([margin], [0.0], dtype=dtype)
    loss = run(make("dpo"), micro).loss
    assert loss.item() == pytest.approx(max(0.0, -0.1 * margin), abs=1e-6)
    assert gradient(micro, 0.1).isfinite().all()


def test_beta_scales_the_margin_and_nothing_else():
    assert torch.equal(values([2.0, -3.0], [1.0, 0.5], beta=0.25), values([1.0, -1.5], [0.5, 0.25], beta=0.5))


def test_a_constant_reference_is_no_reference():
    """h = log pi(chosen) - log pi(rejected) when the reference gives both answers the same."""
    logp = torch.tensor([-3.0, -5.0, -0.5, -2.0], dtype=torch.float64)

    def loss(constant):
        sides = [TokenScores(2, torch.arange(2), part, torch.full_like(part, constant)) for part in logp.split(2)]
        return make("dpo", beta=0.5)(Pairs(*sides)).loss

    assert torch.equal(loss(-16.0), loss(0.0))
    assert loss(0.0).tolist() == pytest.approx([exact(0.5 * -2.5), exact(0.5 * -3.0)], rel=1e-12)


# ---- soft labels -----------------------------------------------------------------------------------------------------


def test_certain_labels_are_plain_dpo_to_the_last_bit():
    a, b = zip(*RATIOS, strict=True)
    assert torch.equal(values(a, b, preference=[1.0] * len(RATIOS)), values(a, b))
    assert torch.equal(values(a, b, preference=[0.0] * len(RATIOS)), values(b, a))


def test_a_soft_label_is_the_mean_over_flips():
    a, b = [3.0, -7.0, 0.2], [1.0, 2.0, 0.0]
    p = torch.tensor([0.9, 0.25, 0.5], dtype=torch.float64)
    mean = p * values(a, b) + (1 - p) * values(b, a)
    torch.testing.assert_close(values(a, b, preference=p.tolist()), mean, rtol=1e-14, atol=0)


def test_a_soft_label_has_its_own_best_margin():
    best = math.log(0.8 / 0.2) / 0.1
    assert gradient(single_tokens([best], [0.0], columns={"preference": [0.8]}), 0.1).abs().max() < 1e-15


@pytest.mark.parametrize("value", [-0.1, 1.1, 70, math.nan])
def test_a_preference_that_is_no_probability_is_refused(value):
    assert f"`preference` is {value}" in make("dpo").row_problem({"preference": value})


@pytest.mark.parametrize("columns", [{}, {"preference": 0.0}, {"preference": 0.3}, {"preference": 1}])
def test_a_probability_is_a_preference(columns):
    assert make("dpo").row_problem(columns) == ""


def test_unpaired_micro_batch_is_refused():
    with pytest.raises(Exception, match="compares two answers"):
        run(make("dpo"), random_micro(paired=False))
