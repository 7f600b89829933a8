"""TDPO2: what its stopped gradient and its alpha do, at the policy's logits. arXiv 2404.11999."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.theory import sigmoid
from tests.losses.token_pairs import CHOSEN, REJECTED, logit_gradient, token_pair, value
from tests.scoring.test_head import Allocations

FACTS = Facts(at_the_reference=math.log(2))

PAIR = token_pair(seed=2)


def argument(loss, pair=PAIR) -> float:
    return pair.output(loss).metrics["loss_argument"].item()


def test_without_alpha_it_is_dpo_in_value_and_gradient():
    dpo, tdpo2 = make("dpo", beta=0.4), make("tdpo2", beta=0.4, alpha=0.0)
    assert value(tdpo2, PAIR) == pytest.approx(value(dpo, PAIR), rel=1e-15)
    torch.testing.assert_close(logit_gradient(tdpo2, PAIR), logit_gradient(dpo, PAIR), rtol=0, atol=1e-15)


def test_with_alpha_one_only_the_gradient_at_chosen_tokens_is_not_that_of_tdpo1():
    """They differ there by c (p - q), with c = -beta S(-z)."""
    first, second = make("tdpo1", beta=0.4), make("tdpo2", beta=0.4, alpha=1.0)
    assert value(first, PAIR) == pytest.approx(value(second, PAIR), rel=1e-15)
    difference = logit_gradient(first, PAIR) - logit_gradient(second, PAIR)
    c = -0.4 * sigmoid(-argument(first))
    expected = c * (PAIR.policy.softmax(-1) - PAIR.reference.softmax(-1)).detach()
    expected[REJECTED] = 0.0
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 2.0])
def test_the_gradient_at_each_token(alpha):
    """c (e_y - p) at chosen tokens, -c (e_y - (1 - alpha) p - alpha q) at rejected ones."""
    loss = make("tdpo2", beta=0.4, alpha=alpha)
    c = -0.4 * sigmoid(-argument(loss))
    p, q = PAIR.policy.detach().softmax(-1), PAIR.reference.softmax(-1)
    target = torch.nn.functional.one_hot(PAIR.targets, 7)
    expected = c * (target - p)
    expected[REJECTED] = -c * (target - (1 - alpha) * p - alpha * q)[REJECTED]
    torch.testing.assert_close(logit_gradient(loss, PAIR), expected, rtol=0, atol=1e-14)


def test_no_gradient_comes_through_the_chosen_divergence():
    """Without the terms in log-probabilities, chosen logits get exactly nothing; in TDPO1 they do."""
    constants = {name: PAIR.scores[name].detach() for name in ("logp", "ref_logp")}
    for name, reached in (("tdpo1", True), ("tdpo2", False)):
        loss = PAIR.output(make(name), **constants).loss.sum()
        (grad,) = torch.autograd.grad(loss, PAIR.policy, retain_graph=True)
        assert bool(grad[CHOSEN].any()) == reached and grad[REJECTED].any()


def test_alpha_moves_the_loss_by_the_difference_of_divergences():
    """d loss / d alpha = beta S(-z) (K_l - K_w)."""
    low, high, at = (make("tdpo2", beta=0.4, alpha=alpha) for alpha in (0.5 - 1e-6, 0.5 + 1e-6, 0.5))
    expected = 0.4 * sigmoid(-argument(at)) * PAIR.output(at).metrics["seqkl/margin"].item()
    assert (value(high, PAIR) - value(low, PAIR)) / 2e-6 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_finite_differences_agree_only_when_the_chosen_divergence_is_frozen(frozen):
    loss, step = make("tdpo2", beta=0.4, alpha=0.5), 1e-6
    direction = torch.randn(PAIR.policy.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = PAIR.kl.detach()

    def loss_at(by: float) -> float:
        pair = token_pair(PAIR.policy.detach() + by * direction, PAIR.reference, PAIR.targets.tolist())
        kl = torch.cat([kept[CHOSEN], pair.kl[REJECTED]]) if frozen else pair.kl
        return pair.output(loss, forward_kl=kl).loss.item()

    found = (loss_at(step) - loss_at(-step)) / (2 * step)
    slope = (logit_gradient(loss, PAIR) * direction).sum().item()
    assert (found == pytest.approx(slope, rel=1e-7)) == frozen


def test_rewards_have_no_alpha():
    """As the authors' code logs them: the reward margin is the argument of TDPO1."""
    metrics = PAIR.output(make("tdpo2", beta=0.4, alpha=0.25)).metrics
    assert metrics["rewards/margins"].item() == pytest.approx(argument(make("tdpo1", beta=0.4)))
    assert metrics["rewards/margins"].item() != pytest.approx(metrics["loss_argument"].item())


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("statistic", ["forward_kl", "logp"])
def test_a_masked_token_counts_in_nothing(name, statistic):
    """A token of weight 0: another value there changes nothing."""
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    values = [
        PAIR.output(make(name), token_weight=weight, **{statistic: PAIR.scores[statistic] - by * (1 - weight)}).loss
        for by in (0.0, 50.0)
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("name", "knobs", "products"),
    [
        ("dpo", {}, 2),  # a tile of the policy, and the gradient of the hidden states
        ("tdpo1", {}, 2),  # a tile of the reference instead
        ("tdpo2", {"alpha": 0.5}, 2 + 3 / 7),  # both at the three rejected tokens of seven
        ("tdpo2", {"alpha": 1.0}, 2),  # the policy's at chosen tokens, the reference's at rejected ones
        ("tdpo2", {"alpha": 0.0}, 2),
    ],
)
def test_the_backward_pass_makes_only_the_tiles_that_the_loss_needs(name, knobs, products):
    pair = token_pair(seed=2)
    loss = pair.output(make(name, **knobs)).loss.sum()
    with Allocations() as seen:
        loss.backward()
    assert seen.flops == round(products * 7**3)


@pytest.mark.parametrize(
    ("knobs", "message"), [({"alpha": -0.1}, "at least 0"), ({"beta": 0.0}, "above 0"), ({"alpha": None}, "alpha")]
)
def test_bad_knobs(knobs, message):
    with pytest.raises(RecipeError, match=message):
        make("tdpo2", **knobs)


def test_the_bare_name_is_refused_with_both():
    with pytest.raises(RecipeError, match=r"`tdpo` is two losses: `tdpo1` and `tdpo2`"):
        make("tdpo")
