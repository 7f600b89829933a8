"""What an agent of the social world achieves, and how far it is from the model it comes from, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.collation import Collator
from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.reference.live import plan_of
from prefopt.scoring.model import DISTRIBUTION, enable_scoring
from prefopt.scoring.modes import evaluating
from prefopt.world.social import ACTS, ANSWERS, DECIDING, TALK, TURNS, Session, partners, play

LANGUAGE = {*TALK, *ACTS.values(), *ANSWERS.values()}


@dataclass(frozen=True)
class Figures:
    """An agent's conversations in numbers.

    `sales` is a share and `sales_se` its standard error; `kl`, `talk_kl` and `key_kl` are KL(start || agent) per token
    of its own turns in nats, over all turns, in small talk and in the deciding turns; `language` is the share of turns
    an expert could have said, `words` their mean length.
    """

    sales: float
    sales_se: float
    kl: float
    talk_kl: float
    key_kl: float
    language: float
    words: float


def session_row(session: Session) -> dict[str, Any]:
    """A conversation as a row to imitate: what the partner opens with, and all that followed."""
    return {"prompt": session.messages[:1], "completion": session.messages[1:], "label": True}


def measure(
    model: PreTrainedModel, start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> tuple[Figures, list[Session]]:
    """The figures of a model over conversations with `count` new partners, and the conversations."""
    sessions = play(model, tokenizer, partners(count, seed), seed)
    by_turn = list(turn_kl(model, start, tokenizer, sessions))
    said = [session.said(turn).split() for session in sessions for turn in range(TURNS)]
    sales = fmean(session.sold for session in sessions)
    figures = Figures(
        sales=sales,
        sales_se=(sales * (1 - sales) / count) ** 0.5,
        kl=fmean(kl for _, kl in by_turn),
        talk_kl=fmean(kl for turn, kl in by_turn if turn not in DECIDING),
        key_kl=fmean(kl for turn, kl in by_turn if turn in DECIDING),
        language=fmean(2 <= len(words) <= 5 and set(words) <= LANGUAGE for words in said),
        words=fmean(map(len, said)),
    )
    return figures, sessions


@torch.inference_mode()
def turn_kl(
    model: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sequence[Session],
    *,
    batch_size: int = 100,
) -> Iterator[tuple[int, float]]:
    """The turn of each of the agent's tokens, and KL(start || model) there."""
    examples = load_examples(DataSpec(rows=[session_row(session) for session in sessions])).examples
    data = tokenize_examples(examples, tokenizer, TokenSettings()).rows
    enable_scoring(start)
    enable_scoring(model)
    collate = Collator(pad_token_id=tokenizer.pad_token_id, paired=False, turns=True)
    with evaluating(model, start):
        for first in range(0, len(data), batch_size):
            batch = collate(data[first : first + batch_size])
            whole = start(**plan_of(batch), statistics=DISTRIBUTION)["distribution"]
            kl = model(**plan_of(batch), statistics=("forward_kl",), reference=whole)["forward_kl"]
            yield from zip(batch["turn"].tolist(), kl.tolist(), strict=True)


def as_dict(figures: Figures, sessions: Sequence[Session]) -> dict[str, Any]:
    """Figures and conversations as JSON holds them."""
    return {**asdict(figures), "samples": [{"messages": each.messages, "sold": each.sold} for each in sessions]}
