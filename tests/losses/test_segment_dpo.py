"""Segment-level DPO: what counts, what does not, and its limits. arXiv 2501.01821."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.errors import UserError
from prefopt.losses import Needs, make
from prefopt.scoring.scores import MissingStatistic
from tests.losses.facts import Facts
from tests.losses.turns import conversation, flat_gradient
from tests.losses.views import random_micro, run, take_rows
from tests.oracle.float64 import L


def segment_ratio(answer):
    weights = {} if answer.turn is None else dict(zip(answer.turn, answer.segment, strict=True))
    return answer.ratio_of_turns(lambda t: weights.get(t, 1))


def formula(pair, beta=0.1):
    """The sum over the segment's turns stands inside the logistic function."""
    return L(beta * (segment_ratio(pair.chosen) - segment_ratio(pair.rejected)))


def reward(answer, beta=0.1):
    return beta * segment_ratio(answer)


FACTS = Facts(at_the_reference=math.log(2), formula=formula, knobs=({"beta": 0.6},), reward=reward)

CHOSEN = [[0.5, -1.0], [2.0], [0.25, 0.75]]
REJECTED = [[-0.5], [1.0, 0.5], [-3.0]]


def value(micro, beta=0.1):
    return run(make("segment_dpo", beta=beta), micro).loss.item()


def logistic(margin: float, beta: float = 0.1) -> float:
    return math.log1p(math.exp(-beta * margin))


def test_by_hand():
    """Turns 0 and 1: -0.5 + 2 against -0.5 + 1.5, a margin of 0.5."""
    pair = conversation(CHOSEN, REJECTED, segments=([1.0, 1.0, 0.0], [1.0, 1.0, 0.0]))
    assert value(pair) == pytest.approx(logistic(0.5), rel=1e-14)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_segment_of_one_turn_is_dpo_on_that_turn(turn):
    only = [float(place == turn) for place in range(3)]
    pair = conversation(CHOSEN, REJECTED, segments=(only, only))
    alone = conversation([CHOSEN[turn]], [REJECTED[turn]])
    assert value(pair) == pytest.approx(run(make("dpo"), alone).loss.item(), rel=1e-14)
    kept = flat_gradient(make("segment_dpo"), pair)
    torch.testing.assert_close(kept[kept != 0], flat_gradient(make("dpo"), alone), rtol=1e-14, atol=0)


def test_whole_equal_conversations_are_eto():
    pair = conversation(CHOSEN, REJECTED)
    whole = conversation(CHOSEN, REJECTED, segments=([1.0] * 3, [1.0] * 3))
    for each in (pair, whole):
        assert torch.equal(run(make("segment_dpo"), each).loss, run(make("eto"), pair).loss)
        assert torch.equal(flat_gradient(make("segment_dpo"), each), flat_gradient(make("eto"), pair))


def test_the_margin_adds_over_turns_inside_one_logistic_function():
    """It is not the sum of a loss for each turn."""
    turns = [conversation([c], [r]) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    pair = conversation(CHOSEN, REJECTED)
    found = run(make("segment_dpo"), pair)
    margins = [run(make("dpo", beta=1.0), turn).metrics["rewards/margins"].item() for turn in turns]
    assert [found.metrics[f"turn_margins/{t}"].item() for t in range(3)] == pytest.approx(margins, rel=1e-14)
    assert found.loss.item() == pytest.approx(logistic(sum(margins)), rel=1e-14)
    assert found.loss.item() != pytest.approx(sum(value(turn) for turn in turns))


def test_tokens_outside_the_segment_get_no_gradient_and_change_no_value():
    segments = ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    pair = conversation(CHOSEN, REJECTED, segments=segments)
    slopes = flat_gradient(make("segment_dpo"), pair)
    assert (slopes != 0).tolist() == [False, False, True, False, False, True, False, False, False]
    moved = conversation([[9.0, 9.0], CHOSEN[1], [-9.0, 4.0]], [REJECTED[0], [7.0, 7.0], [-7.0]], segments=segments)
    assert value(moved) == value(pair)


def test_a_shared_beginning_of_the_first_turn_cancels():
    """Its tokens have one log-ratio on both sides, so scoring them or not is the same loss, and the same gradient
    once the two copies of a token, which are one function of the weights, are added."""
    shared = [0.7, -1.3]
    with_it = conversation([[*shared, 0.5], [2.0]], [[*shared, -0.5], [1.0]])
    without = conversation([[0.5], [2.0]], [[-0.5], [1.0]])
    assert value(with_it) == pytest.approx(value(without), rel=1e-14)
    slopes, fewer = flat_gradient(make("segment_dpo"), with_it), flat_gradient(make("segment_dpo"), without)
    torch.testing.assert_close(slopes[0:2] + slopes[4:6], torch.zeros(2, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(slopes[[2, 3, 6, 7]], fewer, rtol=1e-14, atol=0)


def test_equal_models_give_log_two_and_a_swap_turns_the_margin():
    same = conversation([[0.0], [0.0]], [[0.0], [0.0]], segments=([1.0, 0.0], [0.0, 1.0]))
    assert value(same) == pytest.approx(math.log(2), rel=1e-15)
    pair, swapped = conversation(CHOSEN, REJECTED), conversation(REJECTED, CHOSEN)
    margin = run(make("segment_dpo"), pair).metrics["rewards/margins"].item()
    assert value(pair) - value(swapped) == pytest.approx(-margin, rel=1e-12)


def test_segments_of_different_numbers_of_turns_in_a_batch_are_worth_what_they_are_alone():
    micro = random_micro(lengths=(3, 5, 1, 4, 2, 6, 3, 1))
    together = run(make("segment_dpo"), micro).loss
    alone = [run(make("segment_dpo"), take_rows(micro, [row])).loss.item() for row in range(4)]
    assert together.tolist() == alone


def test_turn_weights_multiply_their_turn():
    pair = conversation(CHOSEN, REJECTED, segments=([1.0, 0.5, 0.0], [2.0, 0.0, 1.0]))
    margin = (-0.5 + 0.5 * 2.0) - (2.0 * -0.5 - 3.0)
    assert value(pair, 0.3) == pytest.approx(logistic(margin, 0.3), rel=1e-14)


def test_metrics_count_the_turns_and_tokens_of_the_segment():
    pair = conversation(CHOSEN, REJECTED, segments=([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]))
    found = {name: values.tolist() for name, values in run(make("segment_dpo"), pair).metrics.items()}
    assert (found["turns/chosen"], found["turn_tokens/chosen"]) == ([2.0], [4.0])
    assert (found["turns/rejected"], found["turn_tokens/rejected"]) == ([2.0], [3.0])
    assert found["turn_margins/0"] == [0.0]  # -0.5 on both sides
    assert found["turn_margins/1"] == [] and found["turn_margins/2"] == []  # in one of the two segments only
    assert found["rewards/chosen"] == pytest.approx([0.1 * 0.5])
    assert found["logratios/chosen"] == pytest.approx([2.5])  # of the whole conversation


def test_turns_are_read_only_by_those_that_declare_them():
    micro = random_micro()
    view = micro.view(make("dpo").needs)
    for name in ("turn", "segment"):
        with pytest.raises(MissingStatistic, match=rf"`{name}` was read but not given: say turns=True"):
            getattr(view.chosen, name)
    assert torch.equal(
        micro.view(make("segment_dpo").needs).chosen.turn, micro.scores.turn[: micro.sides.desirable_tokens]
    )


def test_a_loss_that_names_segments_must_read_turns_of_pairs():
    for wrong in ({"turns": False}, {"turns": True, "view": "completions"}):
        with pytest.raises(UserError, match="are about the turns of a pair; say turns=True"):
            Needs(**wrong, optional_columns=("segments",))


def test_a_tokens_own_weight_is_multiplied_by_that_of_its_turn():
    micro = random_micro(weighted=True)
    scores = micro.scores
    found = run(make("segment_dpo", beta=1.0), micro).metrics
    terms = scores.token_weight * scores.segment * (scores.logp - scores.ref_logp).detach()
    totals = torch.zeros(8, dtype=torch.float64).index_add(0, scores.sequence, terms)
    torch.testing.assert_close(torch.cat([found["rewards/chosen"], found["rewards/rejected"]]), totals)
