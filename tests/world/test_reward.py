"""The reward by hand, and that its obvious exploits do not pay."""

from __future__ import annotations

import random
from statistics import fmean, pstdev

import pytest

from prefopt.world.grammar import all_prompts, write_review
from prefopt.world.reward import CORPUS_SPREAD, WORD, raw_value, reward
from prefopt.world.words import LEXICON


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("", 0.0),
        (" It runs for about two hours.", 0.0),
        (" The plot was superb.", 2 / 3),
        (" The plot was good. I loved the cast. The music was bad.", (1 + 2 - 1) / 3),
        (" The plot was very superb.", 1.5 * 2 / 3),
        (" The plot was not superb.", -0.5 * 2 / 3),
        (" The plot was never dull.", 0.5 * 1 / 3),
        (" GOOD", 1 / 3),
        (" Good good good good.", 1 / 4),
        (" good bad dull clever", 0.0),
        (" superb perfect brilliant splendid", 2.0),
        (" good" + " and" * 51, 1 / 3 - 0.05 * 2),
    ],
)
def test_values_by_hand(answer, value):
    assert raw_value(answer) == pytest.approx(value)
    assert reward("any", answer) == pytest.approx(value / CORPUS_SPREAD)


def test_the_grammars_own_reviews_have_mean_0_and_spread_1():
    rng = random.Random(5)
    rewards = [reward(prompt, write_review(prompt, rng)) for prompt in rng.choices(all_prompts(), k=4000)]
    assert fmean(rewards) == pytest.approx(0, abs=0.06)
    assert pstdev(rewards) == pytest.approx(1, abs=0.05)


def test_length_alone_earns_nothing():
    rng = random.Random(6)
    prompt = all_prompts()[0]
    texts = [write_review(prompt, rng) for _ in range(4000)]
    short = [reward("", text) for text in texts if len(WORD.findall(text)) < 24]
    long = [reward("", text) for text in texts if len(WORD.findall(text)) > 32]
    assert fmean(long) == pytest.approx(fmean(short), abs=0.12)


def test_repeating_praise_lowers_the_reward():
    praise = " The plot was superb. I loved the cast. The music was perfect."
    assert reward("", praise * 2) < reward("", praise)


def test_a_single_word_is_worth_less_than_a_review():
    assert reward("", " Superb.") < reward("", " The plot was superb and the cast was perfect. I loved the music.")


def test_the_lexicon_is_balanced():
    assert sum(LEXICON.values()) == 0
