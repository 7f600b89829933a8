"""The known reward of the small world: exact, computed from the text alone."""

from __future__ import annotations

import re

from prefopt.world.words import LEXICON, NEGATORS, STRENGTHENER

WORD = re.compile(r"[A-Za-z]+")

# An average over fewer opinion words than this counts the missing ones as 0, so one loud word is no whole review.
FEWEST_OPINIONS = 3
LONGEST = 50
LENGTH_PENALTY = 0.05

# Mean and standard deviation of the raw value over reviews the grammar writes.
CORPUS_MEAN = 0.0
CORPUS_SPREAD = 0.945


def reward(prompt: str, answer: str) -> float:
    """How kind a review is, in standard deviations of the grammar's own reviews around their mean.

    The average value of its opinion words (`words.LEXICON`, -2 to 2), less 0.05 for every word beyond 50. "very"
    before a word makes its value half as large again; "not" or "never" turns its sign and halves it. A word said
    again adds nothing but still counts in the average, so repeating praise lowers the reward, and the average is over
    at least three. Length alone earns nothing. The prompt plays no part; it is taken so that every reward has one
    signature.
    """
    return (raw_value(answer) - CORPUS_MEAN) / CORPUS_SPREAD


def raw_value(answer: str) -> float:
    """The value before it is centred and scaled: opinion average less length penalty."""
    words = WORD.findall(answer.lower())
    places = [place for place, word in enumerate(words) if word in LEXICON]
    first_places = {words[place]: place for place in reversed(places)}
    total = sum(_value(words, place) for place in first_places.values())
    return total / max(FEWEST_OPINIONS, len(places)) - LENGTH_PENALTY * max(0, len(words) - LONGEST)


def _value(words: list[str], place: int) -> float:
    value = LEXICON[words[place]]
    before = words[place - 1] if place else ""
    if before in NEGATORS:
        return -0.5 * value
    return 1.5 * value if before == STRENGTHENER else value
