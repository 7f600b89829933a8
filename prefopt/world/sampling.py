"""Answers of a model in the small world: pairs labelled by the known reward, and what a policy earns and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.messages import is_answer
from prefopt.generation import Generation, encode_prompts, generate
from prefopt.scoring.modes import evaluating
from prefopt.world.grammar import is_grammatical

Reward = Callable[[str, str], float]


@dataclass(frozen=True)
class SampledPairs:
    """Rows `prompt chosen rejected score_chosen score_rejected`, and what gave none.

    `ties` counts the prompts whose usable answers all earn the same, `unusable` the answers that never ended or that
    no data set may hold.
    """

    rows: list[dict[str, Any]]
    ties: int
    unusable: int


@dataclass(frozen=True)
class Measurement:
    """What a policy earns on some prompts and how far it is from its reference.

    `reward` is a mean over answers and `reward_se` its standard error; `kl` is KL(policy || reference) of an answer in
    nats, over the full distribution at each sampled token, summed over the answer and averaged over answers; `length`
    counts tokens, the end marker included; `finished` and `valid` are the shares of answers that ended by themselves
    and that the grammar could have written. `samples` holds every answer with its own figures.
    """

    reward: float
    reward_se: float
    kl: float
    length: float
    finished: float
    valid: float
    samples: list[dict[str, Any]]


def sample_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: Reward,
    *,
    samples_per_prompt: int = 4,
    pairs_per_prompt: int = 1,
    max_new_tokens: int = 72,
    seed: int = 0,
    batch_size: int = 256,
) -> SampledPairs:
    """Sample answers and pair those of one prompt, at most `pairs_per_prompt` each, widest gap in reward first.

    So one pair a prompt is the best answer against the worst. Answers that never ended take no part, since training
    would give them an end marker the model did not write; neither do those a data set may not hold, such as blank ones.
    """
    answers = generate(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    rows, ties = [], 0
    for index, group in groupby(answers, key=lambda answer: answer.prompt_index):
        scored = {answer.text: reward(prompts[index], answer.text) for answer in group if _usable(answer)}
        pairs = _widest_pairs(scored, pairs_per_prompt)
        ties += not pairs
        rows += [{"prompt": prompts[index], **pair} for pair in pairs]
    return SampledPairs(rows, ties, unusable=sum(not _usable(answer) for answer in answers))


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: Reward,
    *,
    max_new_tokens: int = 72,
    seed: int = 0,
    batch_size: int = 256,
) -> Measurement:
    """Sample one answer a prompt and measure reward and KL; `prompts` are openings of the small world.

    `model` and `reference` share tokenizer and vocabulary, and `[batch, T, vocabulary]` logits must fit in memory.
    """
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size)
    kls = answer_kl(model, reference, encode_prompts(tokenizer, prompts), answers)
    samples = [
        _sample(prompts[answer.prompt_index], answer, kl, reward) for answer, kl in zip(answers, kls, strict=True)
    ]
    rewards = [sample["reward"] for sample in samples]
    return Measurement(
        reward=fmean(rewards),
        reward_se=stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0,
        kl=fmean(kls),
        length=fmean(sample["length"] for sample in samples),
        finished=fmean(sample["finished"] for sample in samples),
        valid=fmean(sample["valid"] for sample in samples),
        samples=samples,
    )


def answer_kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    encoded_prompts: Sequence[list[int]],
    answers: Sequence[Generation],
    *,
    batch_size: int = 64,
) -> list[float]:
    """KL(model || reference) of every answer: exact at each of its tokens, summed over them, in nats.

    The sum along a sampled answer is an unbiased estimate of the KL between the two distributions over answers, with
    less variance than the log-ratio of the answer itself.
    """
    rows = [(encoded_prompts[answer.prompt_index], answer.token_ids) for answer in answers]
    totals: list[float] = []
    with evaluating(model, reference):
        for start in range(0, len(rows), batch_size):
            totals += _batch_kl(model, reference, rows[start : start + batch_size]).tolist()
    return totals


def _usable(answer: Generation) -> bool:
    return answer.finished and is_answer(answer.text)


def _widest_pairs(scored: dict[str, float], most: int) -> list[dict[str, Any]]:
    """Pairs of different reward among answers and their rewards."""
    ranked = sorted(scored.items(), key=lambda item: (-item[1], item[0]))
    pairs = [(best, worst) for best, worst in combinations(ranked, 2) if best[1] > worst[1]]
    pairs.sort(key=lambda pair: pair[1][1] - pair[0][1])
    return [
        {"chosen": best, "rejected": worst, "score_chosen": high, "score_rejected": low}
        for (best, high), (worst, low) in pairs[:most]
    ]


def _sample(prompt: str, answer: Generation, kl: float, reward: Reward) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "answer": answer.text,
        "reward": reward(prompt, answer.text),
        "kl": kl,
        "length": len(answer.token_ids),
        "finished": answer.finished,
        "valid": answer.finished and is_grammatical(prompt, answer.text),
    }


def _batch_kl(
    model: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]
) -> Tensor:
    """Summed KL of each row, `[R]`."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer)
        attention_mask[row, :length] = 1
        scored[row, len(prompt) : length] = True
    predicts = scored[:, 1:]
    log_p = _log_probs(model, input_ids, attention_mask, predicts)
    log_q = _log_probs(reference, input_ids, attention_mask, predicts)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.zeros(len(rows)).index_add_(0, predicts.nonzero()[:, 0], kl)


def _log_probs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, predicts: Tensor) -> Tensor:
    """Next-token distributions `[M, V]` at the positions that predict a scored token, in float32 on the CPU."""
    output = model(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False
    )
    logits: Tensor = output.logits[:, :-1][predicts.to(model.device)]
    return logits.float().log_softmax(-1).cpu()
