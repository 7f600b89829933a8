"""The grammar of the small world: it writes short reviews, and it says of any text whether it could have written it.

A prompt is an opening such as "Review of the film The Quiet Harbor:" and an answer the review that follows, with its
leading blank: an optional plain fact, two or three opinions, an optional verdict. Each review has a kindness, the
chance that one of its sentences praises, so some reviews are kind throughout, some harsh, and most are mixed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import lru_cache

from prefopt.world.words import (
    DAYS,
    FACTS,
    FEELINGS,
    KINDS,
    MOODS,
    NAME_FIRST,
    NAME_LAST,
    NEGATORS,
    OPINIONS,
    PEOPLE,
    QUALITIES,
    STRENGTHENER,
    VERDICTS,
)

SLOT = re.compile(r"\{(\w+)\}")
PROMPT = re.compile(rf"Review of the ({'|'.join(KINDS)}) The \w+ \w+:")
CLASSES = {"feeling": FEELINGS, "mood": MOODS}
PLAIN = {"day": DAYS, "people": PEOPLE}


def all_prompts() -> list[str]:
    """Every opening there is, in a fixed order that mixes kinds and names."""
    prompts = [
        f"Review of the {kind} The {first} {last}:" for kind in KINDS for first in NAME_FIRST for last in NAME_LAST
    ]
    random.Random(0).shuffle(prompts)
    return prompts


def write_review(prompt: str, rng: random.Random) -> str:
    """One answer to `prompt`, with its leading blank and without an end marker.

    Raises `ValueError` when `prompt` is not an opening of this world.
    """
    kind = kind_of(prompt)
    kindness = rng.betavariate(1.0, 1.0)
    forms = [rng.choice(FACTS[kind])] if rng.random() < 0.6 else []
    forms += rng.choices(OPINIONS, k=rng.randint(2, 3))
    if rng.random() < 0.5:
        forms.append(rng.choice(VERDICTS))
    return "".join(" " + _fill(form, kind, kindness, rng) for form in forms)


def kind_of(prompt: str) -> str:
    """What a prompt asks to be reviewed: one of `words.KINDS`."""
    match = PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not an opening of the small world: {prompt!r}")
    return match.group(1)


def grammatical_share(prompt: str, answer: str) -> float:
    """The share of an answer's sentences, 0 to 1, that the grammar can write for this prompt.

    A last sentence without its full stop counts as wrong, an empty answer as 0.
    """
    sentences = re.findall(r"[^.]+\.?", answer)
    pattern = _sentence_pattern(kind_of(prompt))
    return sum(bool(pattern.fullmatch(sentence)) for sentence in sentences) / max(1, len(sentences))


def is_grammatical(prompt: str, answer: str) -> bool:
    """Whether every sentence of the answer is one the grammar can write for this prompt."""
    return grammatical_share(prompt, answer) == 1.0


def _fill(form: str, kind: str, kindness: float, rng: random.Random) -> str:
    """The form with every slot replaced; the aspects of one sentence differ, and a contrast turns its tone."""
    aspects = iter(rng.sample(KINDS[kind], k=len(KINDS[kind])))
    kind_tone = rng.random() < kindness

    def word(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot == "aspect":
            return next(aspects)
        if slot in PLAIN:
            return rng.choice(PLAIN[slot])
        tone = kind_tone != (slot == "contrast")
        return _opinion_word(CLASSES[slot], tone, rng) if slot in CLASSES else _quality(tone, rng)

    return SLOT.sub(word, form)


def _quality(kind_word: bool, rng: random.Random) -> str:
    """An adjective alone, after "very", or the opposite one after a negation."""
    form = rng.random()
    if form < 0.15:
        return f"{rng.choice(NEGATORS)} {_opinion_word(QUALITIES, not kind_word, rng)}"
    word = _opinion_word(QUALITIES, kind_word, rng)
    return f"{STRENGTHENER} {word}" if form < 0.35 else word


def _opinion_word(words: dict[str, float], kind_word: bool, rng: random.Random) -> str:
    return rng.choice([word for word, value in words.items() if (value > 0) == kind_word])


@lru_cache(maxsize=len(KINDS))
def _sentence_pattern(kind: str) -> re.Pattern[str]:
    """Matches a leading blank and one whole sentence of this kind of review."""
    slots = {name: _one_of(words) for name, words in {**PLAIN, **CLASSES, "aspect": KINDS[kind]}.items()}
    slots["quality"] = slots["contrast"] = rf"(?:(?:{'|'.join((*NEGATORS, STRENGTHENER))}) )?{_one_of(QUALITIES)}"
    forms = (*FACTS[kind], *OPINIONS, *VERDICTS)
    # The only character of a form with a meaning in a pattern is its full stop.
    patterns = [SLOT.sub(lambda match: slots[match.group(1)], form.replace(".", r"\.")) for form in forms]
    return re.compile(f" (?:{'|'.join(patterns)})")


def _one_of(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(words)})"
