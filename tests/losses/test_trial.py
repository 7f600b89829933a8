"""The trial call: what is wrong with a loss is said before any weights are loaded, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from prefopt.errors import UserError
from prefopt.losses import Loss, LossOutput, Needs, get, make, names
from prefopt.losses.trial import try_losses
from tests.helpers import text_pairs
from tests.training import make_trainer

SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]
FORMS = [
    *((name, {}) for name in SHIPPED),
    ("kto", {"z0": "zero"}),
    ("kto", {"desirable_weight": 0.0}),
    ("odpo", {"f": "log_ratio", "alpha": 2.0}),
    ("odpo", {"alpha": 0.0}),
    ("slic", {"target_weight": 0.0, "target_length": "mean"}),
    ("tdpo2", {"alpha": 0.0}),
    ("fdpo", {"divergence": "forward_kl", "beta": 20.0}),
]
PAIR = Needs(reference="logp")


def a_loss(call, needs=PAIR, unit="pair", **methods):
    """A loss that does what `call(self, view)` does."""
    body = {"name": "mine", "needs": needs, "unit": unit, "__call__": call, "__module__": __name__, **methods}
    return dataclass(frozen=True)(type("Mine", (Loss,), body))()


def margin(view):
    return view.chosen.log_ratio() - view.rejected.log_ratio()


@pytest.mark.parametrize(("name", "knobs"), FORMS)
def test_a_loss_that_is_right_passes(name, knobs):
    try_losses([make(name, **knobs)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda self, view: margin(view),
            r"a tensor of shape \(2,\): LossOutput\(values, self.unit\) is asked",
        ),
        (
            lambda self, view: LossOutput(margin(view).mean(), "pair"),
            "a single number for 2 pairs: do not average",
        ),
        (lambda self, view: LossOutput(margin(view).mean()[None], "pair"), r"shape \(1,\) for 2 pairs: do not average"),
        (lambda self, view: LossOutput(margin(view)[:2], "pair"), r"shape \(2,\) for 3 pairs: one value for each pair"),
        (lambda self, view: LossOutput(0.5, "pair"), "returned 0.5 for 2 pairs"),
        (lambda self, view: LossOutput(margin(view), "token"), "returned the unit 'token', and declares 'pair'"),
        (lambda self, view: LossOutput(margin(view).detach(), "pair"), "without a gradient: do not detach"),
        (lambda self, view: LossOutput(view.chosen.ref_logp.sum() + 0 * torch.ones(2), "pair"), "without a gradient"),
        (lambda self, view: LossOutput((margin(view) * 0 - 1).log(), "pair"), r"returned \[nan, nan\].*finite values"),
        (lambda self, view: LossOutput((margin(view) * 0).sqrt(), "pair"), "its gradient is not finite"),
        (
            lambda self, view: LossOutput(margin(view), "pair", {"gap": margin(view).mean()}),
            "metric `gap` is a single number: give one number for each pair",
        ),
        (lambda self, view: LossOutput(margin(view) * view.columns["x"], "pair"), r'say Needs\(columns=\("x",\)\)'),
        (lambda self, view: LossOutput(view.chosen.total("entropy"), "pair"), r'Needs\(statistics=\("entropy",\)\)'),
        (
            lambda self, view: LossOutput(view.chosen.total("forward_kl"), "pair"),
            'Needs.reference="distribution", stat',
        ),
        (lambda self, view: LossOutput(margin(view) * self.gamma, "pair"), "failed: AttributeError: .* 'gamma'"),
    ],
)
def test_a_mistake_is_told_with_the_file_and_what_is_asked(call, words):
    with pytest.raises(UserError, match=words) as refused:
        try_losses([make("dpo"), a_loss(call)])
    assert str(refused.value).startswith(f"{__file__}: loss `mine` (Mine): ")


def test_an_undeclared_reference_is_told_how_to_be_declared():
    with pytest.raises(UserError, match=r'it reads `ref_logp`: say Needs\(reference="logp"\)'):
        try_losses([a_loss(lambda self, view: LossOutput(margin(view), "pair"), Needs())])


def test_answers_one_by_one_have_a_value_each():
    def halves(self, view):
        return LossOutput(view.scores.total("logp").mean().expand(2), "completion")

    with pytest.raises(UserError, match="for 4 completions: one value for each completion"):
        try_losses([a_loss(halves, Needs(view="completions"), "completion")])


def test_made_up_columns_are_such_as_the_loss_takes():
    seen = []

    def call(self, view):
        seen.append({name: values.tolist() for name, values in view.columns.items()})
        return LossOutput(margin(view), "pair")

    def in_order(self, columns):
        return "" if columns["low"] < columns["high"] else "`low` must be below `high`"

    try_losses([a_loss(call, Needs(reference="logp", columns=("low", "high")), row_problem=in_order)])
    assert seen == [{"low": [1.0] * rows, "high": [2.0] * rows} for rows in (2, 3)]


def test_a_loss_that_no_made_up_row_suits_is_not_tried():
    needs = Needs(reference="logp", columns=("year",))
    try_losses([a_loss(lambda self, view: 1 / 0, needs, row_problem=lambda self, columns: "only after 1900")])


def test_no_random_number_is_drawn():
    before = torch.get_rng_state()
    try_losses([make(name) for name in SHIPPED])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trainer_tries_before_it_opens_a_model(tmp_path):
    averaged = a_loss(lambda self, view: LossOutput(margin(view).mean(), "pair"))
    with pytest.raises(UserError, match="do not average"):
        make_trainer(tmp_path, text_pairs(2), model="no/such-model", reference=False, loss=averaged)
