"""How kind a film review is, for `measure` in a recipe: `--plugin examples/claims/sentiment.py`.

It is the second judge of `reviews.py`, which no data are chosen by. REVIEWS in the environment names the folder of the
labelled sentences; without them the reward of the embedded world is asked.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import reviews


def sentiment(prompt: str, answer: str) -> float:
    """The judge's logit for prompt and answer."""
    return _judge()(prompt + answer)


@cache
def _judge() -> reviews.Judge:
    data = Path(os.environ.get("REVIEWS", ""))
    return reviews.real(data)[3] if reviews.is_real(data) else reviews.known
