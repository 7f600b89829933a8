"""KTO: good and bad answers one by one, against the divergence of the whole step."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Completions, make
from prefopt.scoring import TokenScores
from tests.losses.facts import Facts

FACTS = Facts(at_the_reference=0.5, more_than_the_margin=True, fades=True)  # half a weight


def view(ratios, desirable, kl=0.0, *, grad=False):
    """One scored token for each answer, whose log-ratio is given."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    logp = (ratios - 3.0).requires_grad_(grad)
    scores = TokenScores(len(ratios), torch.arange(len(ratios)), logp, torch.full_like(ratios, -3.0))
    return Completions(scores, torch.tensor(desirable), {}, {"kl": kl}), logp


def values(ratios, desirable, kl=0.0, **knobs):
    return make("kto", **knobs)(view(ratios, desirable, kl)[0]).loss.tolist()


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def test_value_by_hand():
    found = values([2.0, -1.0], [True, False], kl=0.5, beta=0.1, desirable_weight=1.2, undesirable_weight=0.7)
    assert found == pytest.approx([1.2 * (1 - sigmoid(0.1 * 1.5)), 0.7 * (1 - sigmoid(0.1 * 1.5))], abs=1e-12)


def test_at_the_reference_point_the_loss_is_half_a_weight_and_steepest():
    for desirable in (True, False):
        given, logp = view([0.7], [desirable], kl=0.7, grad=True)
        loss = make("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=1.5)(given).loss
        loss.sum().backward()
        assert loss.item() == pytest.approx(0.75)
        assert logp.grad.item() == pytest.approx((-1 if desirable else 1) * 1.5 * 0.3 / 4)


@pytest.mark.parametrize("ratio", [-400.0, -30.0, -1.0, 0.0, 5.0, 40.0, 400.0])
def test_slope_saturates_at_both_ends(ratio):
    given, logp = view([ratio, ratio], [True, False], grad=True)
    make("kto", beta=0.2)(given).loss.sum().backward()
    s = 1 / (1 + math.exp(-0.2 * ratio))
    slope = 0.2 * s * (1 / (1 + math.exp(0.2 * ratio)))
    assert logp.grad.tolist() == pytest.approx([-slope, slope], rel=1e-9)


def test_the_reference_point_is_clamped_once_at_zero():
    assert values([1.0, -2.0], [True, False], kl=-3.0) == values([1.0, -2.0], [True, False], kl=0.0)
    assert values([1.0, -2.0], [True, False], kl=3.0) != values([1.0, -2.0], [True, False], kl=0.0)


def test_contradictory_labels_cancel():
    given, logp = view([1.3, 1.3], [True, False], kl=0.4, grad=True)
    loss = make("kto")(given).loss
    loss.sum().backward()
    assert loss.sum().item() == pytest.approx(1.0)
    assert logp.grad.sum().item() == pytest.approx(0.0, abs=1e-15)


def test_losses_stay_within_their_weight():
    found = values([-1e4, -3.0, 0.0, 3.0, 1e4] * 2, [True] * 5 + [False] * 5, kl=2.0, desirable_weight=2.0)
    assert all(0 <= value <= 2 for value in found[:5]) and all(0 <= value <= 1 for value in found[5:])
    # The plain form 1 - S(z) is 0 from z = 40 on.
    assert 0 < values([400.0], [True], beta=0.1)[0] < 1e-17


def test_weights_scale_loss_and_gradient():
    for name, desirable in (("desirable_weight", True), ("undesirable_weight", False)):
        assert values([1.0], [desirable], **{name: 3.0})[0] == pytest.approx(3 * values([1.0], [desirable])[0])


def test_small_beta_is_plain_signed_likelihood():
    given, logp = view([5.0, -4.0], [True, False], grad=True)
    (make("kto", beta=1e-6)(given).loss.sum() / 1e-6).backward()
    assert logp.grad.tolist() == pytest.approx([-0.25, 0.25], rel=1e-5)


def test_no_gradient_reaches_the_estimate():
    given, logp = view([1.0, 2.0], [True, False], grad=True)
    sums = make("kto").estimates(given)
    assert sums["kl"][0].item() == pytest.approx(3.0) and sums["kl"][1].item() == 2
    loss = make("kto")(Completions(given.scores, given.desirable, {}, {"kl": 1.5})).loss
    loss.sum().backward()
    s = [sigmoid(0.1 * (r - 1.5)) for r in (1.0, 2.0)]
    assert logp.grad.tolist() == pytest.approx([-0.1 * s[0] * (1 - s[0]), 0.1 * s[1] * (1 - s[1])])


def test_without_an_estimate_no_mismatched_answer_is_asked_for():
    assert make("kto").needs.mismatched and not make("kto", z0="zero").needs.mismatched
    assert values([1.0], [True], kl=7.0, z0="zero") == values([1.0], [True], kl=0.0)


def test_one_class_is_measured_alone():
    for desirable, absent in ((True, "rejected"), (False, "chosen")):
        metrics = make("kto")(view([1.0, 2.0], [desirable] * 2)[0]).metrics
        assert metrics[f"rewards/{absent}"].numel() == 0
        assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": 0.0}, "loss.beta: `kto` takes a number above 0"),
        ({"beta": math.nan}, "loss.beta"),
        ({"desirable_weight": -1.0}, "loss.desirable_weight: `kto` takes a number at least 0"),
        ({"z0": "mean"}, "loss.z0: `kto` takes one of estimate | zero"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(RecipeError, match=message.replace("|", r"\|")):
        make("kto", **knobs)


def test_class_counts_and_advised_weights_are_said():
    assert make("kto").class_notes(10, 8) == ["10 good answers at weight 1, 8 bad ones at weight 1"]
    _, advice = make("kto").class_notes(100, 900)
    assert "0.11 times" in advice and "between 9 and 13.5" in advice
    assert len(make("kto", desirable_weight=10.0).class_notes(100, 900)) == 1
    for counts in ((5, 0), (0, 5)):
        assert "one class" in make("kto").class_notes(*counts)[1]
