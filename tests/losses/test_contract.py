"""What every registered loss must do. A new loss is tested here by existing."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import get, make, names
from prefopt.losses.knobs import knobs_of
from prefopt.losses.pages import page, table_rows
from prefopt.losses.views import UndeclaredColumn
from prefopt.scoring.scores import STATISTICS, MissingStatistic
from tests.losses.facts import facts_of
from tests.losses.views import full_view, micro_for, per_row, random_micro, run, single_tokens, take_rows

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]

every_loss = pytest.mark.parametrize("loss", [make(name) for name in SHIPPED], ids=SHIPPED)


def demanded(loss):
    """Columns that a row must have; where one set or another will do, the first that the loss takes."""
    columns, optional = list(loss.needs.columns), list(loss.needs.optional_columns)
    numbers = {"score_chosen": 1.0, "score_rejected": 1.0, **facts_of(loss.name).columns}
    while problem := loss.row_problem({name: numbers.get(name, 0.5) for name in columns}):
        assert optional, f"tests/losses/test_{loss.name}.py: say in FACTS which numbers its columns may hold: {problem}"
        columns.append(optional.pop(0))
    return tuple(columns)


def columns_of(loss, rows):
    """Harmless values for the columns a loss demands: scores a unit apart, everything else as its facts say, or 0.5."""
    values = {"score_chosen": 2.0, "score_rejected": 1.0, **facts_of(loss.name).columns}
    return {name: [values.get(name, 0.5)] * rows for name in demanded(loss)}


# ---- values ---------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_value_per_unit_in_the_dtype_given(loss, dtype):
    micro = micro_for(loss, dtype=dtype)
    output = run(loss, micro)
    assert output.unit == loss.unit
    assert output.loss.shape == (full_view(loss, micro).units(loss.unit),)
    assert output.loss.dtype == dtype
    assert output.loss.isfinite().all()


@every_loss
def test_extreme_log_ratios_give_finite_values_and_gradients(loss):
    sides = list(itertools.product([-1e4, -1.0, 0.0, 1.0, 1e4], repeat=2))
    micro = single_tokens(*zip(*sides, strict=True), dtype=torch.float32, columns=columns_of(loss, len(sides)))
    output = run(loss, micro)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert micro.scores.logp.grad.isfinite().all()
    assert all(values.isfinite().all() for values in output.metrics.values())


@every_loss
@pytest.mark.parametrize("ratio", [-25.0, 25.0])
def test_bfloat16_is_finite_at_a_margin_of_fifty(loss, ratio):
    micro = single_tokens([ratio], [-ratio], dtype=torch.bfloat16, columns=columns_of(loss, 1))
    output = run(loss, micro)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert micro.scores.logp.grad.isfinite().all()


@every_loss
def test_losses_differ_from_each_other(loss):
    alike = {loss.name, facts_of(loss.name).same_as}
    others = [make(name) for name in SHIPPED if name not in alike and facts_of(name).same_as != loss.name]
    micro = random_micro(columns=sorted({name for each in (loss, *others) for name in demanded(each)}))
    mine = run(loss, micro).loss.mean()
    for other in others:
        assert not torch.isclose(mine, run(other, micro).loss.mean(), rtol=1e-9), other


# ---- gradients ------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_agrees_with_finite_differences(loss, weighted):
    micro = micro_for(loss, weighted=weighted)
    frozen = full_view(loss, micro).estimates

    def value(logp):
        micro.scores.statistics["logp"] = logp
        return loss(micro.view(loss.needs, frozen)).loss

    assert torch.autograd.gradcheck(value, (micro.scores.logp.detach().clone().requires_grad_(),))


@every_loss
def test_no_gradient_reaches_reference_or_columns(loss):
    micro = micro_for(loss)
    frozen = [micro.scores.statistics["ref_logp"].requires_grad_(), *micro.columns.values()]
    for value in frozen:
        value.requires_grad_()
    run(loss, micro).loss.sum().backward()
    assert micro.scores.logp.grad.abs().sum() > 0
    assert all(value.grad is None or not value.grad.any() for value in frozen)


@every_loss
def test_a_first_step_raises_desirable_and_lowers_other_answers(loss):
    micro = single_tokens([0.0] * 3, [0.0] * 3, columns=columns_of(loss, 3))
    run(loss, micro).loss.sum().backward()
    desirable, others = micro.scores.logp.grad.split(3)
    assert (desirable < 0).all()
    assert (others == 0).all() if loss.needs.completions == "desirable" else (others > 0).all()


# ---- rows -----------------------------------------------------------------------------------------------------------


@every_loss
def test_permuting_rows_permutes_values(loss):
    micro = micro_for(loss)
    order = [2, 0, 3, 1]
    shuffled = take_rows(micro, order)
    estimates = full_view(loss, micro).estimates
    values = per_row(loss, micro, loss(micro.view(loss.needs, estimates)).loss)
    moved = per_row(loss, shuffled, loss(shuffled.view(loss.needs, estimates)).loss)
    for position, row in enumerate(order):
        torch.testing.assert_close(moved[position], values[row], rtol=0, atol=1e-12)


@every_loss
def test_a_micro_batch_without_rows_gives_nothing_and_keeps_the_graph(loss):
    micro = micro_for(loss, lengths=())
    output = loss(micro.view(loss.needs, full_view(loss, micro_for(loss)).estimates))
    assert output.loss.shape == (0,)
    assert all(values.shape == (0,) for values in output.metrics.values())
    output.loss.sum().backward()
    assert micro.scores.logp.grad is not None


@every_loss
@pytest.mark.parametrize("lengths", [(0, 3, 2, 0), (0, 0, 0, 0)])
def test_completions_that_score_nothing_are_finite(loss, lengths):
    micro = micro_for(loss, lengths=lengths)
    output = run(loss, micro)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert micro.scores.logp.grad.isfinite().all()
    assert all(values.isfinite().all() for values in output.metrics.values())


# ---- declarations ---------------------------------------------------------------------------------------------------


@every_loss
def test_what_is_not_declared_cannot_be_read(loss):
    declared = {"logp", *loss.needs.statistics, *(() if loss.needs.reference == "none" else ("ref_logp",))}
    micro = random_micro(columns=(*loss.needs.columns, "stray"))
    view = micro.view(loss.needs)
    for scores in (view.chosen, view.rejected) if loss.needs.view == "pairs" else (view.scores,):
        for name in set(STATISTICS) - declared:
            with pytest.raises(MissingStatistic, match=name):
                getattr(scores, name)
    for read in (view.columns.__getitem__, view.columns.get, view.columns.__contains__):
        with pytest.raises(UndeclaredColumn, match="stray"):
            read("stray")


@every_loss
def test_optional_columns_may_be_absent(loss):
    assert run(loss, random_micro(columns=demanded(loss))).loss.isfinite().all()


@every_loss
def test_metrics_are_vectors_without_gradient(loss):
    for name, values in run(loss, micro_for(loss)).metrics.items():
        assert values.dim() == 1, name
        assert not values.requires_grad, name
        assert values.is_floating_point(), name


@every_loss
def test_pair_losses_log_rewards_under_the_usual_names(loss):
    metrics = run(loss, micro_for(loss)).metrics
    if loss.needs.view == "pairs":
        usual = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
        assert usual | {"logps/chosen", "logps/rejected"} <= set(metrics)


@every_loss
def test_is_a_frozen_value(loss):
    assert make(loss.name) == loss
    assert hash(make(loss.name)) == hash(loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 2.0


# ---- knobs ----------------------------------------------------------------------------------------------------------


def outside(knob):
    """Values that a knob must refuse."""
    wrong = ["a word", [1.0], {}]
    if knob.type in (float, int):
        wrong += [math.nan, math.inf, -math.inf, True]
    if knob.type is int:
        wrong += [1.5]
    if knob.type is str:
        wrong = [1, True] + (["no such choice"] if knob.choices else [])
    if knob.type is bool:
        wrong += [0, 1]
    wrong += [limit for limit in (knob.above, knob.below) if limit is not None]
    wrong += [] if knob.at_least is None else [knob.at_least - 1e-9]
    wrong += [] if knob.at_most is None else [knob.at_most + 1e-9]
    return wrong if knob.optional else [*wrong, None]


@every_loss
def test_values_outside_a_knobs_range_are_refused_by_name(loss):
    for knob in knobs_of(type(loss)):
        for value in outside(knob):
            with pytest.raises(RecipeError, match=rf"loss\.{knob.name}: `{loss.name}` takes .*not "):
                make(loss.name, **{knob.name: value})


@every_loss
def test_every_knob_is_explained(loss):
    for knob in knobs_of(type(loss)):
        assert knob.help, knob.name
        assert knob.type is bool or knob.range, f"{knob.name} has no range"


# ---- papers ---------------------------------------------------------------------------------------------------------


@every_loss
def test_the_page_has_every_section(loss):
    text = page(loss.name)
    for heading in ("Formula", "Derivation", "Knobs", "Needs", "Published values", "Errata and departures"):
        assert f"\n\n{heading}\n  " in text, heading
    assert all(f"  {knob.name}: default " in text for knob in knobs_of(type(loss)))


@every_loss
def test_the_table_names_paper_and_purpose(loss):
    row = next(row for row in table_rows() if row.name == loss.name)
    assert "arXiv" in row.paper or "http" in row.paper
    assert row.data and row.reference and row.line and "\n" not in row.line
    assert all(knob.name in row.defaults for knob in knobs_of(type(loss)))


@every_loss
def test_the_file_is_short(loss):
    assert len(Path(inspect.getfile(type(loss))).read_text().splitlines()) < 60


@every_loss
def test_a_recipe_is_shipped(loss):
    assert f"name: {loss.name}" in (ROOT / "configs" / f"{loss.name}.yaml").read_text()
