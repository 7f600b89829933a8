"""The ways to score a head agree on the loss, and the floor does as many products as it says."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefopt.benchmark.heads import (
    _LOSSES,
    PRODUCTS,
    HeadInputs,
    HeadShape,
    _dense,
    _frozen,
    _ours,
    multiply,
)

SHAPE = HeadShape(tokens=16, width=8, vocabulary=5000)


@pytest.mark.parametrize("loss", _LOSSES)
def test_ours_and_the_dense_form_have_the_same_loss_and_gradients(loss):
    statistics = ("logp",) if loss == "dpo" else ("logp", "ref_logp", "forward_kl")
    results = []
    for score in (_ours, _dense):
        inputs = HeadInputs(SHAPE)
        value = _LOSSES[loss](score(inputs, *statistics))
        results.append((value, *torch.autograd.grad(value, (inputs.hidden, inputs.head))))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("loss", _LOSSES)
def test_a_frozen_head_has_the_loss_and_gradient_of_a_reference_that_shares_it(loss):
    statistics = ("logp",) if loss == "dpo" else ("logp", "ref_logp", "forward_kl")
    results = []
    for score in (_frozen, _ours):
        inputs = HeadInputs(SHAPE)
        inputs.ref_head = inputs.head.detach()
        value = _LOSSES[loss](score(inputs, *statistics))
        results.append((value, *torch.autograd.grad(value, (inputs.hidden,))))
    for frozen, ours in zip(*results, strict=True):
        torch.testing.assert_close(frozen, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", PRODUCTS)
def test_the_floor_does_as_many_products_as_it_says(loss):
    inputs = HeadInputs(SHAPE)
    with FlopCounterMode(display=False) as counter:
        multiply(inputs, PRODUCTS[loss])
    one = 2 * SHAPE.tokens * SHAPE.width * SHAPE.vocabulary
    assert counter.get_total_flops() == PRODUCTS[loss] * one


@pytest.mark.parametrize(("loss", "chosen", "rejected"), [("tdpo1", 1.0, 1.0), ("tdpo2", 0.0, 0.5)])
def test_the_divergences_pull_as_the_paper_says(loss, chosen, rejected):
    """Gradients by the divergence of a token are those by its log-probability, times this."""
    logp, kl = torch.zeros(16, requires_grad=True), torch.ones(16, requires_grad=True)
    value = _LOSSES[loss]({"logp": logp, "ref_logp": torch.zeros(16), "forward_kl": kl})
    by_logp, by_kl = torch.autograd.grad(value, (logp, kl))
    torch.testing.assert_close(by_kl[:8], chosen * by_logp[:8])
    torch.testing.assert_close(by_kl[8:], rejected * by_logp[8:])
    assert (by_logp[:8] < 0).all() and (by_logp[8:] > 0).all()
