"""What the theory says of every loss, beyond the contract that `test_contract.py` holds them to.

A new loss is tested here by existing; what is true of some losses only is said in `FACTS` of the loss's own test file.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.losses import Objective, get, make, names
from prefopt.losses.knobs import knobs_of
from tests.losses.facts import facts_of
from tests.losses.test_contract import columns_of, demanded
from tests.losses.test_objective import step
from tests.losses.views import Micro, full_view, per_row, random_micro, run, single_tokens, take_rows
from tests.oracle.rows import as_micro, equal_rows, random_rows

SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]
LOSSES = [make(name) for name in SHIPPED]
# Each loss at its defaults, and at every other choice of a knob that has choices.
FORMS = [
    *LOSSES,
    *(
        make(loss.name, **{knob.name: choice})
        for loss in LOSSES
        for knob in knobs_of(type(loss))
        for choice in knob.choices
        if choice != knob.default
    ),
]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=SHIPPED)
every_form = pytest.mark.parametrize("loss", FORMS, ids=repr)
pair_losses = pytest.mark.parametrize(
    "loss", [one for one in LOSSES if one.needs.view == "pairs"], ids=lambda x: x.name
)
with_reference = pytest.mark.parametrize(
    "loss", [one for one in LOSSES if one.needs.reference != "none"], ids=lambda x: x.name
)


def values(loss, micro: Micro) -> torch.Tensor:
    return run(loss, micro).loss.detach()


def gradient(loss, micro: Micro) -> torch.Tensor:
    return torch.autograd.grad(run(loss, micro).loss.sum(), micro.scores.logp)[0]


def pairs_at(loss, chosen, rejected, **options) -> Micro:
    """Pairs of one-token answers with these log-ratios, and the columns the loss demands."""
    return single_tokens(chosen, rejected, columns=columns_of(loss, len(chosen)), **options)


def moved(micro: Micro, name: str, by: float) -> Micro:
    """The same micro-batch with a constant added to a statistic of every token."""
    micro.scores.statistics[name] = (micro.scores.statistics[name].detach() + by).requires_grad_(name == "logp")
    return micro


# ---- rows and steps -------------------------------------------------------------------------------------------------


@every_form
def test_a_row_is_worth_the_same_alone(loss):
    """No loss couples rows but through the estimates of the whole step."""
    micro = random_micro(columns=demanded(loss))
    estimates = full_view(loss, micro).estimates
    together = per_row(loss, micro, loss(micro.view(loss.needs, estimates)).loss)
    for row, expected in enumerate(together):
        alone = take_rows(micro, [row])
        assert torch.equal(loss(alone.view(loss.needs, estimates)).loss, expected)


@every_loss
@pytest.mark.parametrize("split", [[[0], [1, 2, 3]], [[3, 1], [], [0, 2]], [[0], [1], [2], [3]]])
def test_any_split_of_a_step_is_the_same_step(loss, split):
    """The estimates, which the trainer takes before, are held."""
    whole, objective = random_micro(columns=demanded(loss)), Objective([(1.0, loss)])
    estimates = {f"0/{name}": value for name, value in full_view(loss, whole).estimates.items()}
    counts = torch.tensor(objective.counts(whole.sides))

    def share(micro: Micro) -> torch.Tensor:
        return objective.combine(objective(micro.scores, micro.sides, micro.columns, estimates)[0], counts)

    expected, found = share(whole), sum(share(take_rows(whole, rows)) for rows in split)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(total, whole.scores.logp)[0] for total in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [pair for pair in itertools.combinations(LOSSES, 2) if not any(loss.needs.mismatched for loss in pair)],
    ids=lambda loss: loss.name,
)
def test_a_mixture_is_the_weighted_sum_of_its_parts(one, other):
    columns = dict.fromkeys(demanded(one) + demanded(other))
    micro = random_micro(columns=tuple(columns))

    def loss_and_gradient(objective):
        loss = step(objective, [micro])
        return loss.detach(), torch.autograd.grad(loss, micro.scores.logp)[0]

    mixed = loss_and_gradient(Objective([(0.3, one), (2.0, other)]))
    parts = [loss_and_gradient(Objective([(1.0, loss)])) for loss in (one, other)]
    for found, first, second in zip(mixed, *parts, strict=True):
        torch.testing.assert_close(found, 0.3 * first + 2.0 * second, rtol=1e-12, atol=1e-12)


@pair_losses
def test_a_likelihood_term_beside_it_changes_no_metric(loss):
    micro = random_micro(columns=demanded(loss))

    def metrics(*losses):
        return Objective([(1.0, each) for each in losses])(micro.scores, micro.sides, micro.columns)[1]

    alone = metrics(loss)
    for mixed in (metrics(loss, make("sft")), metrics(make("sft"), loss)):
        assert all(torch.equal(mixed[name], found) for name, found in alone.items())


# ---- direction ------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_points_the_wrong_way(loss, dtype):
    """Nowhere is the chosen answer lowered or the rejected one raised, but beyond the target of a loss that has one."""
    sides = list(itertools.product([-1e4, -80.0, -1.0, 0.0, 1.0, 80.0, 1e4], repeat=2))
    micro = pairs_at(loss, *zip(*sides, strict=True), dtype=dtype)
    chosen, rejected = gradient(loss, micro).split(len(sides))
    if facts_of(loss.name).turns:
        at_target = (chosen > 0).tolist()
        margins = [a - b for a, b in sides]
        assert max(m for m, turned in zip(margins, at_target, strict=True) if not turned) < min(
            m for m, turned in zip(margins, at_target, strict=True) if turned
        )
    else:
        assert (chosen <= 0).all()
        assert (rejected >= 0).all()


@every_form
def test_a_chosen_answer_far_below_the_reference_is_still_raised(loss):
    """Also where an exponential would overflow, the pair that is wrong by most keeps a gradient, or is given up."""
    micro = pairs_at(loss, [-1e4], [0.0], dtype=torch.float32)
    assert (gradient(loss, micro)[0] < 0) == (not facts_of(loss.name).fades)


# ---- what is read ---------------------------------------------------------------------------------------------------


@with_reference
def test_only_the_ratio_to_the_reference_counts(loss):
    """Both models at once less likely by a factor: nothing changes."""
    micro = random_micro(columns=demanded(loss))
    expected = values(loss, micro)
    both = moved(moved(micro, "logp", -64.0), "ref_logp", -64.0)
    torch.testing.assert_close(values(loss, both), expected, rtol=1e-10, atol=1e-10)


@every_loss
def test_a_shift_of_both_answers_is_seen_by_those_that_read_more_than_the_margin(loss):
    expected = values(loss, pairs_at(loss, [-3.0, 2.0], [-1.0, -2.5]))
    found = values(loss, moved(pairs_at(loss, [-3.0, 2.0], [-1.0, -2.5]), "logp", -4.0))
    unchanged = torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert unchanged == (not facts_of(loss.name).more_than_the_margin), (
        f"tests/losses/test_{loss.name}.py: more_than_the_margin of its FACTS is not what was found"
    )


@with_reference
def test_equal_models_give_one_value_whatever_the_answers(loss):
    rows = equal_rows()
    micro = as_micro(rows, ())
    micro.columns = {
        name: torch.tensor(column, dtype=torch.float64) for name, column in columns_of(loss, len(rows)).items()
    }
    estimates = dict.fromkeys(full_view(loss, micro).estimates, 0.0)
    at_zero = loss(micro.view(loss.needs, estimates)).loss
    known = facts_of(loss.name).at_the_reference
    assert known is not None, f"tests/losses/test_{loss.name}.py: say `at_the_reference` in its FACTS"
    assert at_zero.tolist() == pytest.approx([known] * len(at_zero), rel=1e-14)


@pytest.mark.parametrize("loss", [one for one in LOSSES if one.needs.reference == "none"], ids=lambda x: x.name)
def test_a_loss_without_a_reference_is_the_same_under_any(loss):
    micro = random_micro(columns=demanded(loss))
    expected = values(loss, micro)
    assert torch.equal(values(loss, moved(micro, "ref_logp", -5.0)), expected)


@pair_losses
@pytest.mark.parametrize("times", [2, 5])
def test_tokens_written_twice_count_twice_in_sums_and_once_in_means(loss, times):
    """Every token `times` over, each with its own log-probability, or with a share of it."""
    rows = random_rows(6, seed=8)
    columns = columns_of(loss, len(rows))

    def micro(share: float, copies: int) -> Micro:
        def answer(given):
            return type(given)([v * share for v in given.policy for _ in range(copies)],
                               [v * share for v in given.reference for _ in range(copies)],
                               kl=[v * share for v in given.kl for _ in range(copies)])  # fmt: skip

        written = [type(row)(answer(row.chosen), answer(row.rejected)) for row in rows]
        made = as_micro(written, ())
        made.columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        return made

    once = values(loss, micro(1.0, 1))
    repeated, shared = values(loss, micro(1.0, times)), values(loss, micro(1.0 / times, times))
    same, other = (repeated, shared) if facts_of(loss.name).per_token else (shared, repeated)
    torch.testing.assert_close(same, once, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other, once, rtol=1e-3)


# ---- knobs ----------------------------------------------------------------------------------------------------------


def variants(loss):
    """The loss with one knob changed, for every knob and every value of one with choices."""
    for knob in knobs_of(type(loss)):
        given = facts_of(loss.name).beside.get(knob.name, {})
        if knob.choices:
            others = [choice for choice in knob.choices if choice != knob.default]
        else:
            others = [0.3 if knob.default is None else knob.default * 0.7 + 0.01]
        for other in others:
            yield f"{knob.name}={other}", make(loss.name, **given), make(loss.name, **{**given, knob.name: other})


@every_loss
def test_every_knob_and_every_choice_acts(loss):
    micro = random_micro(columns=demanded(loss))
    estimates = dict.fromkeys(full_view(loss, micro).estimates, 0.4)
    for label, usual, changed in variants(loss):
        pair = [one(micro.view(one.needs, estimates)).loss for one in (usual, changed)]
        assert not torch.allclose(*pair, rtol=1e-6), label


@every_loss
def test_a_knob_of_another_loss_is_refused_by_name(loss):
    own = {knob.name for knob in knobs_of(type(loss))}
    others = {knob.name for other in LOSSES for knob in knobs_of(type(other))} - own
    for knob in others:
        with pytest.raises(RecipeError, match=rf"loss\.{knob}: `{loss.name}` does not read it"):
            make(loss.name, **{knob: 0.25})


def test_knobs_that_exclude_each_other_are_refused():
    with pytest.raises(RecipeError, match="alpha"):
        make("fdpo", divergence="js", alpha=0.5)
    with pytest.raises(RecipeError, match="gamma"):
        make("simpo", gamma=1.6, gamma_beta_ratio=0.5)
