"""TDPO1 and what it shares with TDPO2, at the policy's logits: values, gradients, invariances. arXiv 2404.11999."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import sigmoid
from tests.losses.token_pairs import CHOSEN, REJECTED, logit_gradient, token_pair, value

FACTS = Facts(at_the_reference=math.log(2))

FORMS = [make("tdpo1", beta=0.4), make("tdpo2", beta=0.4, alpha=0.5), make("tdpo2", beta=0.4, alpha=1.0)]
both_forms = pytest.mark.parametrize("loss", FORMS, ids=repr)
TDPO1 = FORMS[0]


def argument(loss, pair) -> float:
    return pair.output(loss).metrics["loss_argument"].item()


@both_forms
def test_a_value_by_hand(loss):
    """Two entries, one token each: KL(q || p) with q = (1/2, 1/2), p = (0.9, 0.1), not the other way round."""
    policy = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()
    reference = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    pair = token_pair(policy, reference, targets=[0, 1], chosen=1)
    chosen_kl, rejected_kl = math.log(0.5 / 0.9) / 2 + math.log(0.5 / 0.1) / 2, math.log(1.25**2 / 1.0) / 2
    assert chosen_kl == pytest.approx(0.510826, abs=1e-6)
    ratios = math.log(0.9 / 0.5) - math.log(0.8 / 0.5)
    z = loss.beta * (ratios - getattr(loss, "alpha", 1.0) * (rejected_kl - chosen_kl))
    assert value(loss, pair) == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)
    metrics = {name: each.item() for name, each in pair.output(loss).metrics.items()}
    assert metrics["seqkl/chosen"] == pytest.approx(chosen_kl)
    assert metrics["seqkl/rejected"] == pytest.approx(rejected_kl)
    assert metrics["seqkl/margin"] == pytest.approx(rejected_kl - chosen_kl)
    assert metrics["rewards/chosen"] == pytest.approx(loss.beta * (math.log(1.8) + chosen_kl))
    assert metrics["rewards/margins"] == pytest.approx(loss.beta * (ratios + chosen_kl - rejected_kl))
    assert metrics["loss_argument"] == pytest.approx(z)


@both_forms
def test_divergences_are_summed_over_an_answer_and_averaged_over_its_tokens(loss):
    pair = token_pair(seed=3)
    metrics = {name: each.item() for name, each in pair.output(loss).metrics.items()}
    for side, tokens in (("chosen", CHOSEN), ("rejected", REJECTED)):
        assert metrics[f"seqkl/{side}"] == pytest.approx(pair.kl[tokens].sum().item())
        assert metrics[f"kl_per_token/{side}"] == pytest.approx(pair.kl[tokens].mean().item())


@both_forms
def test_equal_models_give_log_two_and_rewards_of_zero(loss):
    logits = token_pair(seed=1).policy.detach()
    output = token_pair(logits, logits.clone()).output(loss)
    assert output.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    for name in ("rewards/chosen", "rewards/rejected", "seqkl/chosen", "seqkl/rejected", "loss_argument"):
        assert output.metrics[name].item() == 0.0


@both_forms
def test_swapping_the_answers_flips_the_argument(loss):
    pair = token_pair(seed=4)
    tokens = [*range(REJECTED.start, REJECTED.stop), *range(CHOSEN.start, CHOSEN.stop)]
    swapped = token_pair(pair.policy.detach()[tokens], pair.reference[tokens], pair.targets[tokens].tolist(),
                         chosen=REJECTED.stop - REJECTED.start)  # fmt: skip
    z = argument(loss, pair)
    assert argument(loss, swapped) == pytest.approx(-z, rel=1e-12)
    assert value(loss, pair) - value(loss, swapped) == pytest.approx(-z, rel=1e-9)


@both_forms
@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_a_constant_added_to_all_logits_of_a_token_changes_nothing(loss, whose):
    pair = token_pair(seed=5)
    logits = {"policy": pair.policy.detach().clone(), "reference": pair.reference.clone()}
    logits[whose][2] += 13.0
    shifted = token_pair(**logits, targets=pair.targets.tolist())
    assert value(loss, shifted) == pytest.approx(value(loss, pair), rel=1e-12)
    torch.testing.assert_close(logit_gradient(loss, shifted), logit_gradient(loss, pair), rtol=0, atol=1e-12)


@both_forms
def test_other_targets_leave_the_divergences_unchanged(loss):
    pair = token_pair(seed=6)
    other = token_pair(pair.policy.detach(), pair.reference, ((pair.targets + 1) % 7).tolist())
    one, two = (each.output(loss).metrics for each in (pair, other))
    assert one["logps/chosen"] != two["logps/chosen"]
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith(("seqkl", "kl_per_token")))


@both_forms
def test_only_beta_times_the_bracket_counts(loss):
    pair = token_pair(seed=7)
    knobs = {} if loss.name == "tdpo1" else {"alpha": loss.alpha}
    bracket = argument(loss, pair) / loss.beta
    for beta in (1e-9, 0.02, 3.0):
        found = value(make(loss.name, beta=beta, **knobs), pair)
        assert found == pytest.approx(math.log1p(math.exp(-beta * bracket)), rel=1e-12)


@both_forms
def test_two_pieces_of_an_answer_add(loss):
    """D and K of an answer are those of its two parts together: one more pair whose answers are the second parts."""
    pair = token_pair(seed=8)
    first = [*range(CHOSEN.start, CHOSEN.start + 2), *range(REJECTED.start, REJECTED.start + 1)]
    second = [token for token in range(len(pair.targets)) if token not in first]
    parts = [
        token_pair(pair.policy.detach()[tokens], pair.reference[tokens], pair.targets[tokens].tolist(), chosen=chosen)
        for tokens, chosen in ((first, 2), (second, CHOSEN.stop - CHOSEN.start - 2))
    ]
    assert sum(argument(loss, part) for part in parts) == pytest.approx(argument(loss, pair), rel=1e-12)


# ---- TDPO1 alone ----------------------------------------------------------------------------------------------------


def test_the_gradient_at_a_token_does_not_know_the_policy():
    """+-c (e_y - q), with c = -beta S(-z): the policy's distribution cancels."""
    pair = token_pair(seed=2)
    c = -TDPO1.beta * sigmoid(-argument(TDPO1, pair))
    q = pair.reference.softmax(-1)
    sign = torch.ones(len(pair.targets), 1, dtype=torch.float64)
    sign[REJECTED] = -1.0
    expected = sign * c * (torch.nn.functional.one_hot(pair.targets, 7) - q)
    torch.testing.assert_close(logit_gradient(TDPO1, pair), expected, rtol=0, atol=1e-13)


def test_the_margin_is_linear_in_the_policy_logits():
    one, other = token_pair(seed=2), token_pair(seed=9)
    targets = one.targets.tolist()

    def margin(logits):
        return argument(TDPO1, token_pair(logits, one.reference, targets))

    ends = [margin(each.policy.detach()) for each in (one, other)]
    mixed = margin(0.3 * one.policy.detach() + 0.7 * other.policy.detach())
    assert mixed == pytest.approx(0.3 * ends[0] + 0.7 * ends[1], rel=1e-12)


def test_a_chosen_answer_is_drawn_away_from_the_reference():
    """The loss falls as K_w rises and as K_l falls: why there is a second form."""
    pair = token_pair(seed=2)
    (slope,) = torch.autograd.grad(pair.output(TDPO1).loss.sum(), pair.kl)
    assert (slope[CHOSEN] < 0).all() and (slope[REJECTED] > 0).all()


def test_log_ratio_and_divergence_have_mean_zero_under_the_reference():
    """sum_y q(y) (log p(y) - log q(y) + KL) = 0 at every token."""
    pair = token_pair(seed=10)
    q, p = pair.reference.softmax(-1), pair.policy.softmax(-1)
    mean = (q * (p.log() - q.log() + pair.kl.unsqueeze(1))).sum(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


def test_the_slope_of_a_divergence_is_p_less_q():
    pair = token_pair(seed=11)
    (slope,) = torch.autograd.grad(pair.kl[2], pair.policy)
    expected = torch.zeros_like(slope)
    expected[2] = (pair.policy.softmax(-1) - pair.reference.softmax(-1))[2]
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-14)
    assert slope.sum().abs() < 1e-14
