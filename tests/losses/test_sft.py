"""SFT: likelihood of the desirable answers, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prefopt.losses import Completions, make
from prefopt.scoring import TokenScores
from tests.losses.facts import Facts
from tests.losses.views import random_micro, run, take_rows

FACTS = Facts(more_than_the_margin=True)


def test_is_the_cross_entropy_of_the_tokens():
    logits = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([3, 0, 10, 7, 7])
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    output = make("sft")(Completions(TokenScores(2, torch.tensor([0, 0, 0, 1, 1]), logp)))
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, target, reduction="none"), rtol=1e-12, atol=0)
    assert output.unit == "token"


def test_token_weights_scale_the_tokens():
    logp, weight = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1.0, 0.5, 0.0])
    scores = TokenScores(1, torch.zeros(3, dtype=torch.int64), logp, token_weight=weight)
    assert make("sft")(Completions(scores)).loss.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("paired", [True, False])
def test_reads_the_desirable_answers_alone(paired):
    micro = random_micro(paired=paired, desirable=4)
    output = run(make("sft"), micro)
    assert torch.equal(output.loss, -micro.scores.logp[: micro.sides.desirable_tokens])
    output.loss.sum().backward()
    assert not micro.scores.logp.grad[micro.sides.desirable_tokens :].any()


def test_is_the_same_when_the_other_answers_were_never_scored():
    micro = random_micro()
    alone = micro.scores.slice(slice(0, 4), slice(0, micro.sides.desirable_tokens))
    sides = micro.sides._replace(size=4, tokens=micro.sides.desirable_tokens)
    skipped = type(micro)(alone, sides, {})
    assert torch.equal(run(make("sft"), micro).loss, run(make("sft"), skipped).loss)


def test_rows_that_are_all_undesirable_give_nothing():
    assert run(make("sft"), random_micro(paired=False, desirable=0)).loss.shape == (0,)


def test_logs_its_tokens():
    output = run(make("sft"), take_rows(random_micro(), [1, 2]))
    assert list(output.metrics) == ["nll_loss"]
    assert torch.equal(output.metrics["nll_loss"], output.loss.detach())


def test_has_no_knobs():
    with pytest.raises(Exception, match=r"loss\.beta: `sft` does not read it\..*`dpo`"):
        make("sft", beta=0.1)
