"""Mixtures: exact sums, exact splits, and what the system is told to compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from prefopt.errors import DataError, RecipeError
from prefopt.losses import Loss, LossOutput, Needs, Objective, Sides, make, sides_of
from tests.losses.views import Micro, random_micro, take_rows


@dataclass(frozen=True)
class Shifted(Loss):
    """Log-prob of an answer less the mean over the step: a loss that must know the whole step."""

    scale: float = 1.0
    name = "shifted"
    needs = Needs(view="completions", reference="distribution", statistics=("forward_kl",), columns=("aim",))
    unit = "completion"

    def __call__(self, view):
        return LossOutput(self.scale * (view.scores.total("logp") - view.estimates["mean"]) ** 2, self.unit)

    def estimates(self, view):
        total = view.scores.total("logp")
        return {"mean": (total.sum(), torch.tensor(len(total)))}


@dataclass(frozen=True)
class Averaged(Loss):
    """Returns a mean, which no loss may do."""

    needs = Needs(columns=("preference",))

    def __call__(self, view):
        return LossOutput(view.chosen.total("logp").mean()[None], self.unit)


def step(objective: Objective, micros: list[Micro], weights: list[torch.Tensor] | None = None) -> torch.Tensor:
    """The loss of a step over these micro-batches, as a trainer computes it."""
    counts = torch.tensor([objective.counts(micro.sides) for micro in micros], dtype=torch.float64).sum(0)
    parts = [objective.estimates(micro.scores, micro.sides, micro.columns) for micro in micros]
    estimates = {name: sum(part[name][0] for part in parts) / sum(part[name][1] for part in parts) for name in parts[0]}
    shares = []
    for index, micro in enumerate(micros):
        weight = None if weights is None else weights[index]
        sums, _ = objective(micro.scores, micro.sides, micro.columns, estimates, weight)
        shares.append(objective.combine(sums, counts))
    return torch.stack(shares).sum()


def loss_and_gradient(objective: Objective, micro: Micro) -> tuple[torch.Tensor, torch.Tensor]:
    loss = step(objective, [micro])
    return loss.detach(), torch.autograd.grad(loss, micro.scores.logp)[0]


MIXTURES = [
    Objective.of("dpo"),
    Objective.of("sft"),
    Objective.of(["dpo", "sft"], [1.0, 0.25]),
    Objective([(1.0, Shifted()), (0.5, make("dpo", beta=0.5)), (2.0, Shifted(scale=3.0))]),
]


# ---- one loss, several losses ----------------------------------------------------------------------------------------


def test_one_loss_is_its_mean_over_units():
    micro = random_micro()
    sums, metrics = Objective.of("dpo")(micro.scores, micro.sides, {})
    output = make("dpo")(micro.view(make("dpo").needs))
    assert torch.equal(step(Objective.of("dpo"), [micro]), output.loss.mean())
    assert torch.equal(sums, output.loss.sum()[None])
    assert {name: values.tolist() for name, values in metrics.items()} == {
        name: values.tolist() for name, values in output.metrics.items()
    }


def test_a_mixture_is_linear_in_its_weights():
    micro = random_micro()
    parts = [loss_and_gradient(Objective.of(loss), micro) for loss in ("dpo", make("dpo", beta=0.7), "sft")]
    mixed = loss_and_gradient(Objective.of(["dpo", make("dpo", beta=0.7), "sft"], [0.3, 2.0, 0.05]), micro)
    for found, terms in zip(mixed, zip(*parts, strict=True), strict=True):
        expected = 0.3 * terms[0] + 2.0 * terms[1] + 0.05 * terms[2]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_term_beside_it_changes_no_metric_in_either_order():
    micro = random_micro()

    def metrics(*losses):
        return Objective.of(losses)(micro.scores, micro.sides, {})[1]

    alone = metrics("dpo")
    for mixed in (metrics("dpo", "sft"), metrics("sft", "dpo")):
        assert all(torch.equal(mixed[name], values) for name, values in alone.items())
        assert set(mixed) - set(alone) == {"nll_loss", "loss/dpo", "loss/sft"}


def test_each_term_logs_its_own_values():
    micro = random_micro()
    mixture = Objective.of(["dpo", make("dpo", beta=0.7), "sft"], [0.5, 1.0, 2.0])
    sums, metrics = mixture(micro.scores, micro.sides, {})
    own = [metrics[f"loss/{label}"] for label in ("dpo", "dpo_2", "sft")]
    assert [values.shape[0] for values in own] == mixture.counts(micro.sides)
    assert [values.sum() for values in own] == list(sums)
    torch.testing.assert_close(
        sum(weight * values.mean() for weight, values in zip((0.5, 1.0, 2.0), own, strict=True)), step(mixture, [micro])
    )
    assert not any(values.requires_grad for values in metrics.values())


def test_of_two_metrics_with_one_name_the_first_terms_is_kept():
    micro = random_micro()
    _, metrics = Objective.of([make("dpo", beta=0.7), "dpo"])(micro.scores, micro.sides, {})
    torch.testing.assert_close(metrics["rewards/chosen"], 0.7 * metrics["logratios/chosen"])


# ---- steps made of micro-batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", MIXTURES, ids=lambda one: "+".join(one.labels))
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0], [1, 2, 3]], [[3, 1], [], [0, 2]], [[0], [1], [2], [3]]])
def test_any_split_of_the_rows_is_the_same_step(objective, split):
    whole = random_micro(columns=("aim",))
    weights = torch.tensor([1.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    parts = [take_rows(whole, rows) for rows in split]
    expected = step(objective, [whole], [weights])
    found = step(objective, parts, [weights[rows] for rows in split])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradient, other = (torch.autograd.grad(loss, whole.scores.logp)[0] for loss in (found, expected))
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", MIXTURES, ids=lambda one: "+".join(one.labels))
def test_a_micro_batch_without_rows_adds_zero_and_keeps_the_graph(objective):
    micro = random_micro((), columns=("aim",))
    estimates = {f"{index}/mean": torch.tensor(1.0) for index in range(3)}
    sums, metrics = objective(micro.scores, micro.sides, micro.columns, estimates)
    loss = objective.combine(sums, torch.full_like(sums, 8.0))
    loss.backward()
    assert loss.item() == 0
    assert micro.scores.logp.grad is not None
    assert all(values.shape == (0,) for values in metrics.values())


def test_a_step_without_a_single_unit_of_a_term_adds_zero_for_it():
    micro = random_micro(paired=False, desirable=0)
    assert Objective.of("sft").counts(micro.sides) == [0]
    assert step(Objective.of("sft"), [micro]).item() == 0


# ---- row weights -----------------------------------------------------------------------------------------------------


def test_row_weights_multiply_values_and_leave_counts_alone():
    micro = random_micro()
    weights = torch.tensor([2.0, 0.0, 1.0, 0.5])
    objective = Objective([(1.0, make("dpo")), (1.0, make("sft")), (1.0, Shifted())])
    plain = objective(micro.scores, micro.sides, {"aim": weights}, {"2/mean": torch.tensor(0.5)})
    found = objective(micro.scores, micro.sides, {"aim": weights}, {"2/mean": torch.tensor(0.5)}, weights)
    tokens = weights.double()[micro.scores.sequence[: micro.sides.desirable_tokens]]
    for name, spread in {"dpo": weights.double(), "sft": tokens, "shifted": weights.double().repeat(2)}.items():
        expected = plain[1][f"loss/{name}"] * spread
        torch.testing.assert_close(found[1][f"loss/{name}"], expected, rtol=0, atol=1e-15)
    assert torch.equal(found[1]["rewards/chosen"], plain[1]["rewards/chosen"])


def test_row_weights_of_single_answers_follow_their_rows():
    micro = random_micro((2, 1, 3), paired=False, desirable=2)
    weights = torch.tensor([2.0, 5.0, 7.0])
    sums, _ = Objective.of("sft")(micro.scores, micro.sides, {}, row_weight=weights)
    logp = micro.scores.logp
    torch.testing.assert_close(sums[0], -(2 * logp[:2].sum() + 5 * logp[2]))


# ---- needs -----------------------------------------------------------------------------------------------------------


def test_needs_are_those_of_all_terms():
    mixture = Objective([(1.0, make("sft")), (1.0, Shifted()), (1.0, make("dpo"))])
    assert mixture.reference == "distribution"
    assert mixture.statistics == ("forward_kl",)
    assert mixture.columns == ("aim",)
    assert mixture.optional_columns == ("preference",)
    assert mixture.paired_required and mixture.all_completions and mixture.has_estimates
    stricter = Objective([(1.0, make("dpo")), (1.0, Averaged())])
    assert (stricter.columns, stricter.optional_columns) == (("preference",), ())


def test_needs_of_one_term_are_no_more_than_its_own():
    sft, dpo = Objective.of("sft"), Objective.of("dpo")
    assert (sft.reference, sft.paired_required, sft.all_completions, sft.has_estimates) == ("none", False, False, False)
    assert (dpo.reference, dpo.paired_required, dpo.all_completions, dpo.has_estimates) == ("logp", True, True, False)


@pytest.mark.parametrize(("columns", "targets", "tokens"), [((), 0, 0), (("target",), 2, 8)])
def test_counts_are_the_units_of_each_term(columns, targets, tokens):
    """Targets are in the batch, and in no term's count."""
    micro = random_micro((3, 5, 1, 2), columns=columns)
    mixture = Objective([(1.0, make("dpo")), (1.0, make("sft")), (1.0, Shifted())])
    batch = {"paired": True, "size": 4 + targets, "desirable_size": 2, "desirable_tokens": 8,
             "target_size": targets, "target_tokens": tokens, "sequence": micro.scores.sequence}  # fmt: skip
    assert sides_of(batch) == micro.sides
    assert mixture.counts(sides_of(batch)) == [2, 8, 4]


@pytest.mark.parametrize("name", ["dpo", "sft", "kto"])
def test_a_term_that_declares_no_target_sees_the_pairs_alone(name):
    micro = random_micro(columns=("target",))
    size, tokens = micro.sides.size, micro.sides.tokens
    pairs = Micro(micro.scores.slice(slice(0, size), slice(0, tokens)), Sides(*micro.sides[:5]), {})
    other = make(name, z0="zero") if name == "kto" else make(name)
    objective = Objective([(1.0, other)])
    assert torch.equal(step(objective, [micro]), step(objective, [pairs]))
    slic = Objective([(1.0, make("slic"))])
    both = step(Objective([(1.0, make("slic")), (1.0, other)]), [micro])
    torch.testing.assert_close(both, step(slic, [micro]) + step(objective, [pairs]), rtol=1e-12, atol=0)
    assert not torch.allclose(step(slic, [micro]), step(slic, [pairs]))


def test_estimates_reach_the_term_that_made_them():
    micro = random_micro(columns=("aim",))
    mixture = Objective([(1.0, make("dpo")), (1.0, Shifted())])
    parts = mixture.estimates(micro.scores, micro.sides, micro.columns)
    assert list(parts) == ["1/mean"]
    total, count = parts["1/mean"]
    assert not total.requires_grad
    sums, _ = mixture(micro.scores, micro.sides, micro.columns, {"1/mean": total / count})
    expected = (micro.scores.total("logp") - micro.scores.total("logp").mean().detach()).square().sum()
    torch.testing.assert_close(sums[1], expected)


def test_data_that_cannot_feed_a_term_is_refused_by_name():
    Objective.of("sft").check_rows(paired=False, columns=())
    with pytest.raises(DataError, match=r"`dpo` compares two answers .*single answers"):
        Objective.of(["sft", "dpo"]).check_rows(paired=False, columns=())
    with pytest.raises(DataError, match="needs a column `aim`"):
        Objective([(1.0, Shifted())]).check_rows(paired=True, columns=("weight",))
    assert "preference" in Objective.of(["sft", "dpo"]).row_problem({"preference": 2.0})
    assert Objective.of(["sft", "dpo"]).row_problem({"preference": 0.5}) == ""


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1", True, None])
def test_weights_that_make_no_sense_are_refused(weight):
    with pytest.raises(RecipeError, match="loss_weights: `sft` has weight"):
        Objective.of(["dpo", "sft"], [1.0, weight])


def test_mixtures_that_make_no_sense_are_refused():
    with pytest.raises(RecipeError, match="all weights are 0"):
        Objective.of(["dpo", "sft"], [0.0, 0])
    with pytest.raises(RecipeError, match="stands there twice"):
        Objective.of(["dpo", "sft", make("dpo", beta=0.1)])
    with pytest.raises(RecipeError, match="at least one loss"):
        Objective.of([])
    with pytest.raises(RecipeError, match="1 weights for 2 losses"):
        Objective.of(["dpo", "sft"], [1.0])
    with pytest.raises(RecipeError, match="brings its own weights"):
        Objective.of(Objective.of("dpo"), [1.0])
    assert Objective.of(MIXTURES[0]) is MIXTURES[0]


def test_a_loss_that_averages_is_caught():
    micro = random_micro(columns=("preference",))
    with pytest.raises(ValueError, match=r"shape \(1,\) per pair; it declares unit pair, so shape \(4,\)"):
        Objective([(1.0, Averaged())])(micro.scores, micro.sides, micro.columns)
