"""How the losses are related: limits in which one is another, exact sums of others, and values fixed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import make
from tests.losses.views import run, single_tokens
from tests.oracle.float64 import Answer, Pair
from tests.oracle.rows import Rows, as_micro, extreme_rows, loss_and_gradient, random_rows

ROWS = random_rows(16, seed=21)
SCORES = ("score_chosen", "score_rejected")


def values_and_gradient(name, rows, columns=(), **knobs):
    return loss_and_gradient(make(name, **knobs), as_micro(rows, columns))


def values(name, rows=ROWS, columns=(), **knobs):
    return values_and_gradient(name, rows, columns, **knobs)[0]


def margins(rows: Rows) -> torch.Tensor:
    return torch.tensor([row.h for row in rows], dtype=torch.float64)


def swapped(rows: Rows) -> Rows:
    """The same pairs with their labels flipped."""
    return [Pair(row.rejected, row.chosen, row.columns) for row in rows]


def one_pair(name: str, a: float, b: float, **knobs) -> tuple[float, float]:
    """Value at these log-ratios, and slope in the chosen answer's log-probability."""
    micro = single_tokens([a], [b])
    loss = run(make(name, **knobs), micro).loss
    loss.sum().backward()
    return loss.item(), micro.scores.logp.grad[0].item()


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "columns", "knobs"),
    [
        ("cdpo", (), {"label_smoothing": 0.0}),
        ("rdpo", (), {"label_smoothing": 0.0}),
        ("dpop", (), {"penalty": 0.0}),
        ("odpo", SCORES, {"alpha": 0.0}),
        ("fdpo", (), {"divergence": "reverse_kl"}),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
@pytest.mark.parametrize("rows", [ROWS, extreme_rows()], ids=["random", "extreme"])
def test_is_dpo_in_its_limit_to_the_last_bit(name, columns, knobs, rows):
    for found, expected in zip(
        values_and_gradient(name, rows, columns, beta=0.3, **knobs),
        values_and_gradient("dpo", rows, beta=0.3),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("limit", "divergence"), [(1e-9, {"divergence": "reverse_kl"}), (1 - 1e-9, {"divergence": "forward_kl"})]
)
def test_the_alpha_divergence_runs_from_the_reverse_to_the_forward_kl(limit, divergence):
    found = values("fdpo", divergence="alpha", alpha=limit)
    torch.testing.assert_close(found, values("fdpo", **divergence), rtol=1e-6, atol=1e-6)


def test_odpo_with_a_gap_of_one_is_dpo():
    rows = [Pair(row.chosen, row.rejected, {"score_chosen": 3.5, "score_rejected": 2.5}) for row in ROWS]
    assert torch.equal(values("odpo", rows, SCORES), values("dpo", rows, beta=0.1))


def test_an_offset_shifts_the_margin_of_dpo():
    """ODPO(h) = DPO(h - D / beta)."""
    rows = [Pair(row.chosen, row.rejected, {"offset": 0.75}) for row in ROWS]
    shifted = [Pair(_less(row.chosen, 0.75 / 0.3), row.rejected) for row in ROWS]
    torch.testing.assert_close(
        values("odpo", rows, ("offset",), beta=0.3), values("dpo", shifted, beta=0.3), rtol=1e-12, atol=0
    )


def _less(answer: Answer, by: float) -> Answer:
    return Answer([answer.policy[0] - by, *answer.policy[1:]], answer.reference)


def test_simpo_between_answers_of_one_length_is_dpo_with_a_constant_reference():
    rows = [Pair(Answer([-1.0, -0.5], [-3.0, -3.0]), Answer([-2.0, -0.25], [-3.0, -3.0]))]
    torch.testing.assert_close(
        values("simpo", rows, beta=2.0, gamma=0.0), values("dpo", rows, beta=1.0), rtol=1e-14, atol=0
    )


def test_the_hinge_has_the_slope_of_dpo_where_a_pair_is_hopeless():
    assert one_pair("hinge", -300.0, 0.0, beta=0.5)[1] == pytest.approx(one_pair("dpo", -300.0, 0.0, beta=0.5)[1])


def test_kto_without_a_reference_point_on_a_pair_is_apo_zero():
    """1 - S(beta a) + S(beta b), over the two answers."""
    found = values("kto", z0="zero", beta=0.3)
    a, b = torch.tensor([[row.chosen.ratio, row.rejected.ratio] for row in ROWS], dtype=torch.float64).T
    expected = 1 - torch.sigmoid(0.3 * a) + torch.sigmoid(0.3 * b)
    torch.testing.assert_close(found[: len(ROWS)] + found[len(ROWS) :], expected, rtol=0, atol=1e-12)


# ---- sums of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45])
def test_smoothed_losses_are_dpo_and_a_multiple_of_the_margin(rate):
    dpo, h = values("dpo", beta=0.3), margins(ROWS)
    conservative, robust = (values(name, beta=0.3, label_smoothing=rate) for name in ("cdpo", "rdpo"))
    torch.testing.assert_close(conservative, dpo + rate * 0.3 * h, rtol=0, atol=1e-12)
    torch.testing.assert_close(robust, dpo - rate / (1 - 2 * rate) * 0.3 * h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.45])
def test_over_flips_rdpo_is_dpo_and_dpo_is_cdpo(rate):
    def over_flips(name, **knobs):
        return (1 - rate) * values(name, **knobs) + rate * values(name, swapped(ROWS), **knobs)

    torch.testing.assert_close(over_flips("rdpo", label_smoothing=rate), values("dpo"), rtol=0, atol=1e-11)
    torch.testing.assert_close(over_flips("dpo"), values("cdpo", label_smoothing=rate), rtol=0, atol=1e-12)


# ---- values by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_has_one_target_for_short_and_long_answers(beta):
    """A margin of 0.3 nats a token at lengths 4 and 40, the rejected answer longer or shorter."""
    rows = [
        Pair(Answer([-1.0] * n, [-1.5] * n), Answer([-1.0] * other, [-1.2] * other)) for n, other in [(4, 9), (40, 7)]
    ]
    assert values("ipo", rows, beta=beta).tolist() == pytest.approx([(0.3 - 1 / (2 * beta)) ** 2] * 2, rel=1e-12)


@pytest.mark.parametrize("z", [-3.0, 0.0, 3.0])
def test_cdpo_at_three_logits(z):
    s = 1 / (1 + math.exp(-z))
    found, _ = one_pair("cdpo", z / 0.1, 0.0, beta=0.1, label_smoothing=0.1)
    assert found == pytest.approx(-(0.9 * math.log(s) + 0.1 * math.log(1 - s)), rel=1e-12)


def test_the_penalty_of_dpop_costs_and_pushes_the_right_way():
    """Chosen answer 2 nats below the reference: dearer than DPO, dearer with the penalty, and pulled up."""
    by_penalty = [one_pair("dpop", -2.0, -3.0, penalty=penalty) for penalty in (0.5, 5.0, 50.0)]
    losses = [one_pair("dpo", -2.0, -3.0)[0], *(loss for loss, _ in by_penalty)]
    assert losses == sorted(losses) and len(set(losses)) == 4
    assert all(slope < 0 for _, slope in by_penalty)
    assert losses[2] == pytest.approx(math.log1p(math.exp(-0.1 * (1.0 - 5.0 * 2.0))), rel=1e-12)
    assert one_pair("dpop", 2.0, -3.0) == one_pair("dpo", 2.0, -3.0)


def test_gamma_of_simpo_is_gamma_and_the_ratio_is_gamma_over_beta():
    rows = [Pair(Answer([-0.5, -1.5], [0.0, 0.0]), Answer([-2.0, -1.0, -1.5], [0.0] * 3))]
    expected = math.log1p(math.exp(-(2.5 * (-1.0 + 1.5) - 1.6)))
    for knobs in ({"gamma": 1.6}, {"gamma_beta_ratio": 0.64}):
        assert values("simpo", rows, beta=2.5, **knobs).item() == pytest.approx(expected, rel=1e-12)
