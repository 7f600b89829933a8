"""The maths of SPIN (arXiv 2401.01335) on a policy that is a table of answers, with the registered losses.

One prompt, V answers of one token. `p` are log-probabilities of the data, `q` those of the current model.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores

V = 6
LOSSES = ("dpo", "hinge")


def tables(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the data and of a model, far apart."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(V, generator=rng, dtype=torch.float64).log_softmax(0) for _ in range(2))


def scores(policy: Tensor, reference: Tensor, answers: Tensor) -> TokenScores:
    return TokenScores(len(answers), torch.arange(len(answers)), policy[answers], ref_logp=reference[answers])


def population_loss(name: str, beta: float, policy: Tensor, start: Tensor, data: Tensor) -> Tensor:
    """The expected loss of a round: real answers from the data, sampled ones from the model it starts from."""
    real, own = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T
    weight = (data[real] + start[own]).exp()
    view = Pairs(scores(policy, start, real), scores(policy, start, own))
    return (weight * make(name, beta=beta)(view).loss).sum()


def gradient(name: str, beta: float, start: Tensor, data: Tensor) -> Tensor:
    """Of the expected loss with respect to the logits, where the round begins."""
    logits = start.clone().requires_grad_()
    population_loss(name, beta, logits.log_softmax(0), start, data).backward()
    return logits.grad


def minimised(beta: float, start: Tensor, data: Tensor) -> Tensor:
    """The table a round ends with when it is trained to the very end."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population_loss("dpo", beta, logits.log_softmax(0), start, data)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return logits.detach().log_softmax(0)


def closed_form(beta: float, start: Tensor, data: Tensor) -> Tensor:
    """Theorem 5.4: p_(t+1) is proportional to p_t (p_data / p_t)^(1 / beta)."""
    return (start + (data - start) / beta).log_softmax(0)


def distance(policy: Tensor, data: Tensor) -> float:
    """KL(data || policy)."""
    return float((data.exp() * (data - policy)).sum())


def contrast(policy: Tensor, data: Tensor) -> Tensor:
    """log policy - log data, without the constant that normalises it."""
    gap = policy - data
    return gap - gap.mean()


@pytest.mark.parametrize(("name", "start"), [("dpo", math.log(2)), ("hinge", 1.0)])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_a_round_begins_at_the_loss_of_zero_margin(name, start, beta):
    data, model = tables()
    assert float(population_loss(name, beta, model, model, data)) == pytest.approx(start, abs=1e-12)


def test_the_loss_is_dpo_with_the_data_chosen_and_the_own_answer_rejected():
    """Written out here, as the paper's eq. 4.7 with the logistic loss."""
    policy, model = tables(seed=5)
    real, own = torch.tensor([0, 3, 2]), torch.tensor([4, 4, 1])
    margin = (policy[real] - model[real]) - (policy[own] - model[own])
    expected = torch.log(1 + torch.exp(-0.3 * margin))
    view = Pairs(scores(policy, model, real), scores(policy, model, own))
    torch.testing.assert_close(make("dpo", beta=0.3)(view).loss, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_a_model_that_is_the_data_stays(name, beta):
    """Theorem 5.2: nothing to gain where the model already is the data, at any beta."""
    data, _ = tables()
    assert gradient(name, beta, data, data).abs().max() < 1e-15
    still = float(population_loss(name, beta, data, data, data))
    for seed in range(1, 20):
        moved = data + 0.3 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(population_loss(name, beta, moved.log_softmax(0), data, data)) >= still - 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_is_not_the_data_moves_towards_it(name):
    data, model = tables()
    step = -gradient(name, 1.0, model, data)
    assert step.abs().max() > 1e-3
    torch.testing.assert_close(
        step / step.norm(), (lambda d: d / d.norm())(data.exp() - model.exp()), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0, 5.0])
def test_the_minimiser_of_a_round_is_the_closed_form(beta):
    data, model = tables()
    torch.testing.assert_close(minimised(beta, model, data), closed_form(beta, model, data), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.4, 0.5, 1.0, 2.0, 5.0])
def test_the_gap_to_the_data_is_multiplied_by_one_minus_one_over_beta(beta):
    data, model = tables()
    after = closed_form(beta, model, data)
    torch.testing.assert_close(contrast(after, data), (1 - 1 / beta) * contrast(model, data), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("beta", "comes_closer"), [(0.1, False), (0.4, False), (0.6, True), (1.0, True), (5.0, True)])
def test_rounds_to_convergence_contract_above_one_half_alone(beta, comes_closer):
    data, model = tables()
    gaps = [contrast(model, data).norm()]
    for _ in range(4):
        model = closed_form(beta, model, data)
        gaps.append(contrast(model, data).norm())
    assert bool(gaps[-1] < gaps[0]) is comes_closer
    assert beta != 1.0 or distance(model, data) < 1e-12


def test_at_one_half_the_gap_swings_for_ever():
    data, model = tables()
    twice = closed_form(0.5, closed_form(0.5, model, data), data)
    torch.testing.assert_close(twice, model, atol=1e-12, rtol=0)


def test_the_hinge_is_flat_beyond_its_margin():
    _, model = tables()
    real, own = torch.tensor([0]), torch.tensor([1])

    def slope(gap: float) -> float:
        policy = (model + torch.tensor([gap, -gap, 0, 0, 0, 0])).requires_grad_()
        view = Pairs(scores(policy, model, real), scores(policy, model, own))
        make("hinge", beta=0.5)(view).loss.sum().backward()
        return float(policy.grad.abs().sum())

    assert slope(1.01) == 0  # beta u = 0.5 * 2.02
    assert slope(0.99) > 0
