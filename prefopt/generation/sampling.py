"""Answers sampled from a model: prompts in, completions out, the same for the same seed.

Every answer has random numbers of its own, drawn from the seed, the prompt's token ids and the answer's number. So what
is sampled for a prompt depends neither on the other prompts nor on who samples it, up to rounding of the logits: in
another batch a token may change where its random number falls within rounding of the border between two tokens. In
float32 that is about one token in a million, in bfloat16 about one in a hundred.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from prefopt.errors import UserError
from prefopt.generation.prompts import Prompt, encode_prompts
from prefopt.scoring.modes import evaluating


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Raises `UserError` for a number out of range.

    Sampling is from the model's own distribution at `temperature`, cut to the likeliest `top_p`; `temperature=0` takes
    the likeliest token.
    """

    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Generation:
    """One sampled answer. `token_ids` ends with the end marker when `finished`; `text` never holds it."""

    prompt_index: int
    text: str
    token_ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Draw:
    """An answer that is to be sampled: the ids it continues, and the seed of its random numbers."""

    prompt_index: int
    ids: list[int]
    seed: int


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Generation]:
    """Sample `samples_per_prompt` answers to every prompt, ordered by prompt.

    A prompt becomes the same token ids as a prompt in training does (`encode_prompts`). Whatever the model's stored
    generation settings add (top-k, repetition penalties) is set aside, so answers are on-policy. The same arguments
    give the same answers, and the caller's random state and the model's mode are left as they were. `batch_size` counts
    answers; prompts of similar length share a batch.

    Raises `UserError` for arguments out of range, and for a prompt that leaves no room within the model's positions;
    `DataError` for a prompt without tokens or one the template refuses.
    """
    sampling = Sampling(samples_per_prompt, max_new_tokens, temperature, top_p, seed)
    draws = plan_draws(encode_prompts(tokenizer, prompts, chat_template_kwargs), sampling)
    with tqdm(total=len(draws), desc="Sampling", unit="answer", disable=None) as bar:
        return sample(model, tokenizer, draws, sampling, batch_size=batch_size, sampled=bar.update)


def plan_draws(encoded: Sequence[list[int]], sampling: Sampling) -> list[Draw]:
    """Every answer that is to be sampled, ordered by prompt; the answers to equal prompts have different seeds."""
    draws, numbers = [], Counter[tuple[int, ...]]()
    for index, ids in enumerate(encoded):
        for _ in range(sampling.samples_per_prompt):
            draws.append(Draw(index, ids, draw_seed(sampling.seed, numbers[tuple(ids)], ids)))
            numbers[tuple(ids)] += 1
    return draws


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draws: Sequence[Draw],
    sampling: Sampling,
    *,
    batch_size: int,
    sampled: Callable[[int], object] = lambda count: None,
) -> list[Generation]:
    """The answers to `draws`, in their order; `sampled` is told how many more there are after each batch."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    settings = _settings(model, tokenizer, sampling)
    check_room(model, draws, sampling)
    answers: dict[int, Generation] = {}
    order = sorted(range(len(draws)), key=lambda place: len(draws[place].ids), reverse=True)
    with evaluating(model), _only(settings, model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = [draws[place] for place in places]
            for place, row in zip(places, _sample_batch(model, batch, sampling, settings), strict=True):
                answers[place] = to_generation(tokenizer, draws[place].prompt_index, row, settings.eos_token_id)
            sampled(len(places))
    return [answers[place] for place in range(len(draws))]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and every end marker the model was published with (chat models often have two).

    Raises `UserError` where there is none.
    """
    stored = getattr(model.generation_config, "eos_token_id", None)
    listed = stored if isinstance(stored, list) else [stored]
    ends = dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if token is not None)
    if not ends:
        raise UserError("neither the tokenizer nor the model has an end-of-sequence token, so no answer could end")
    return list(ends)


def to_generation(tokenizer: PreTrainedTokenizerBase, index: int, row: list[int], ends: Sequence[int]) -> Generation:
    """New tokens `row` as an answer to prompt `index`: up to and with the first end marker; padding may follow it."""
    end = next((place for place, token in enumerate(row) if token in ends), None)
    token_ids = row if end is None else row[: end + 1]
    text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(prompt_index=index, text=str(text), token_ids=token_ids, finished=end is not None)


class DrawTokens(LogitsProcessor):
    """Draws the next token of each row by that row's own random numbers, and leaves no other choice.

    `uniform` `[B, T]` holds numbers in [0, 1) for `T` tokens after a prompt of `width`; a number picks the token at
    whose cumulative probability it lies.
    """

    def __init__(self, uniform: Tensor, width: int) -> None:
        self._uniform, self._width = uniform, width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` `[B, V]` with the drawn token at 0 and all others at minus infinity."""
        # Sums over a large vocabulary want float64, which Apple's GPUs do not have.
        precision = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.to(precision).softmax(-1).cumsum(-1)
        number = self._uniform[:, input_ids.shape[1] - self._width, None].to(cumulative)
        # The last sum is 1 but for rounding.
        token = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token.clamp_(max=scores.shape[-1] - 1), 0.0)


def draw_seed(seed: int, number: int, ids: Sequence[int]) -> int:
    """The seed of the random numbers of one answer: the one of this number among those to the prompt `ids`."""
    digest = hashlib.sha256(f"{seed} {number} {' '.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        do_sample=False,  # `DrawTokens` draws
    )


def check_room(model: Any, draws: Sequence[Draw], sampling: Sampling) -> None:
    """Raise `UserError` for a prompt that leaves no room for an answer within the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(draw.ids) for draw in draws), default=0)
    if positions is not None and longest + sampling.max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens: the longest prompt has {longest} tokens, and with {sampling.max_new_tokens} more it "
            f"passes the model's {positions} positions. Lower max_new_tokens, or leave the longest prompts out"
        )


@contextmanager
def _only(settings: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills every setting left open from the one stored on the model: keep that one out of its way."""
    owners = list(dict.fromkeys([model, getattr(model, "get_base_model", lambda: model)()]))  # an adapter model has two
    stored = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, config in zip(owners, stored, strict=True):
            owner.generation_config = config


def _sample_batch(model: Any, draws: Sequence[Draw], sampling: Sampling, settings: GenerationConfig) -> list[list[int]]:
    """The new tokens of each row, padding included."""
    width = max(len(draw.ids) for draw in draws)
    input_ids = torch.full((len(draws), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, draw in enumerate(draws):
        input_ids[row, width - len(draw.ids) :] = torch.tensor(draw.ids)
        attention_mask[row, width - len(draw.ids) :] = 1
    output: Tensor = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
        logits_processor=_processors(draws, sampling, width),
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _processors(draws: Sequence[Draw], sampling: Sampling, width: int) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    numbers = [
        torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(draw.seed), dtype=torch.float64)
        for draw in draws
    ]
    cuts: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    cuts += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([*cuts, DrawTokens(torch.stack(numbers), width)])
