"""The grammar writes what it says it writes, and recognises exactly that."""

from __future__ import annotations

import random
import re

import pytest

from prefopt.world.grammar import all_prompts, grammatical_share, is_grammatical, kind_of, write_review
from prefopt.world.words import KINDS, LEXICON

FILM = "Review of the film The Quiet Harbor:"


def reviews(n, seed=0):
    rng = random.Random(seed)
    return [(prompt, write_review(prompt, rng)) for prompt in rng.choices(all_prompts(), k=n)]


def test_reviews_follow_the_seed():
    assert reviews(20, seed=1) == reviews(20, seed=1)
    assert reviews(20, seed=1) != reviews(20, seed=2)


def test_openings_are_distinct_and_always_in_the_same_order():
    prompts = all_prompts()
    assert len(set(prompts)) == len(prompts) == 2880
    assert prompts == all_prompts()
    assert {kind_of(prompt) for prompt in prompts[:50]} == set(KINDS)


def test_what_the_grammar_writes_it_recognises():
    assert all(is_grammatical(prompt, review) for prompt, review in reviews(500))


def test_reviews_are_short_texts_with_a_leading_blank():
    texts = [review for _, review in reviews(500)]
    lengths = [len(text.split()) for text in texts]
    assert all(re.fullmatch(r"( [A-Z][^.]*\.){2,5}", text) for text in texts)
    assert 20 < sum(lengths) / len(lengths) < 35
    assert len(set(texts)) > 495


def test_every_opinion_word_is_written():
    words = set(re.findall(r"\w+", " ".join(review for _, review in reviews(2000))))
    assert set(LEXICON) <= words


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (" The plot was very good. I loved the cast.", 1.0),
        (" The plot was good, but the cast was not dull.", 1.0),
        (" The soup was good.", 0.0),
        (" The plot was good. The plot good was.", 0.5),
        (" The plot was good. I loved the", 0.5),
        (" The plot was good", 0.0),
        ("The plot was good.", 0.0),
        ("", 0.0),
    ],
    ids=["right", "contrast", "aspect of another kind", "word order", "cut off", "no full stop", "no blank", "empty"],
)
def test_share_of_grammatical_sentences(answer, share):
    assert grammatical_share(FILM, answer) == share
    assert is_grammatical(FILM, answer) is (share == 1.0)


def test_an_opening_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="not an opening"):
        kind_of("Review of the opera The Quiet Harbor:")
