"""ETO: DPO on whole trajectories; what it reads of the turns and what it logs of them."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import make
from tests.losses.facts import Facts
from tests.losses.turns import conversation, flat_gradient
from tests.losses.views import run
from tests.oracle.float64 import L


def formula(pair, beta=0.1):
    """Every turn weighs 1."""
    return L(beta * (pair.chosen.ratio_of_turns(lambda t: 1) - pair.rejected.ratio_of_turns(lambda t: 1)))


FACTS = Facts(at_the_reference=math.log(2), formula=formula, same_as="dpo")


def test_by_hand():
    """Log-ratios 0.5 + 1 + 0 against -1 + 0.5: a margin of 2."""
    pair = conversation([[0.25, 0.25], [1.0], [0.0]], [[-1.0], [0.25, 0.25]])
    assert run(make("eto", beta=0.3), pair).loss.item() == pytest.approx(math.log1p(math.exp(-0.3 * 2.0)), rel=1e-14)


def test_where_the_turns_end_changes_nothing():
    """Nor does a segment: all of the assistant's tokens count, and only their sum does."""
    ways = [
        conversation([[0.5, -1.0, 2.0]], [[0.25, 0.5]]),
        conversation([[0.5], [-1.0], [2.0]], [[0.25], [0.5]]),
        conversation([[0.5, -1.0], [2.0]], [[0.25], [0.5]], segments=([0.0, 1.0], [1.0, 0.0])),
    ]
    assert len({run(make("eto"), pair).loss.item() for pair in ways}) == 1


def test_is_dpo_on_the_same_tokens():
    pair = conversation([[0.5, -1.0], [2.0]], [[0.25], [0.5], [1.0]])
    assert torch.equal(run(make("eto", beta=0.4), pair).loss, run(make("dpo", beta=0.4), pair).loss)
    assert torch.equal(flat_gradient(make("eto"), pair), flat_gradient(make("dpo"), pair))


def test_turn_metrics_by_hand():
    """Two pairs: three turns against two, and five against five."""
    pair = conversation(
        [[0.25, 0.25], [1.0], [4.0]], [[-1.0], [0.25, 0.25]],
        more=(([[1.0], [2.0], [3.0], [4.0], [5.0]], [[0.5], [0.5], [0.5], [0.5], [0.5]]),),
    )  # fmt: skip
    found = {name: values.tolist() for name, values in run(make("eto"), pair).metrics.items()}
    assert found["turn_margins/0"] == [1.5, 0.5]
    assert found["turn_margins/1"] == [0.5, 1.5]
    assert found["turn_margins/2"] == [2.5]  # the first pair has no third turn on the rejected side
    assert found["turn_margins/later"] == [8.0]  # turns 3 and 4: 3.5 + 4.5
    assert (found["turns/chosen"], found["turns/rejected"]) == ([3.0, 5.0], [2.0, 5.0])
    assert (found["turn_tokens/chosen"], found["turn_tokens/rejected"]) == ([4.0, 5.0], [3.0, 5.0])


def test_per_turn_margins_add_up_to_the_margin():
    pair = conversation([[0.5, -1.0], [2.0], [1.0], [0.5], [3.0]], [[0.25], [0.5], [1.0], [-2.0], [0.125]])
    found = run(make("eto", beta=0.5), pair).metrics
    parts = sum(found[f"turn_margins/{name}"] for name in ("0", "1", "2", "later"))
    torch.testing.assert_close(parts, found["logratios/margin"], rtol=0, atol=1e-14)
    torch.testing.assert_close(0.5 * parts, found["rewards/margins"], rtol=0, atol=1e-14)
