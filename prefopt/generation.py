"""Answers sampled from a model: prompts in, completions out, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.drafts import TextEncoder
from prefopt.data.problems import Where
from prefopt.data.templates import require_template
from prefopt.errors import DataError, UserError
from prefopt.scoring.modes import evaluating

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Generation:
    """One sampled answer. `token_ids` ends with the end marker when `finished`; `text` never holds it."""

    prompt_index: int
    text: str
    token_ids: list[int]
    finished: bool


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

    A prompt is a text or a list of messages, and becomes the same token ids as a prompt in training does; messages are
    rendered by the chat template, with `chat_template_kwargs`, up to and with the header of the answer.

    Sampling is from the model's own distribution at `temperature`, cut to the likeliest `top_p`: whatever the model's
    stored generation settings add (top-k, repetition penalties) is set aside, so answers are on-policy.
    `temperature=0` takes the likeliest token. The same arguments give the same answers, and the caller's random state
    and the model's mode are left as they were. `batch_size` counts answers; prompts of similar length share a batch.

    Raises `UserError` for arguments out of range and `DataError` for a prompt without tokens or one the template
    refuses.
    """
    _check(samples_per_prompt, max_new_tokens, temperature, top_p, batch_size)
    encoded = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
    jobs = [index for index in order for _ in range(samples_per_prompt)]
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    answers: list[Generation] = []
    with evaluating(model), _seeded(model, seed), _only(settings, model):
        for start in tqdm(range(0, len(jobs), batch_size), desc="Sampling", unit="batch", disable=None):
            batch = jobs[start : start + batch_size]
            rows = _generate_batch(model, [encoded[index] for index in batch], settings)
            answers += [_answer(tokenizer, index, row, settings) for index, row in zip(batch, rows, strict=True)]
    return sorted(answers, key=lambda answer: answer.prompt_index)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """The token ids the model continues, for each prompt; none is empty. Raises as `generate` does."""
    encoder = TextEncoder(tokenizer)
    texts = encoder.many(prompt for prompt in prompts if isinstance(prompt, str))
    encoded = []
    for row, prompt in enumerate(prompts):
        where = Where("prompts", row)
        if isinstance(prompt, str):
            ids = [*encoder.prefix, *texts[prompt]]
        else:
            ids = _chat_ids(tokenizer, prompt, where, chat_template_kwargs or {})
        if not ids:
            raise DataError(f"{where}: the prompt has no tokens, so there is nothing to continue. Give it some text")
        encoded.append(ids)
    return encoded


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: Where, kwargs: Mapping[str, Any]
) -> list[int]:
    require_template(tokenizer, where)
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # a template is foreign code and may raise anything
        raise DataError(f"{where}: the chat template fails: {type(error).__name__}: {error}") from error
    # The template has already written whatever special tokens the model wants.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check(samples: int, new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in {"samples_per_prompt": samples, "max_new_tokens": new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; it must be 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **{"do_sample": False, **sampling},
    )


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and every end marker the model was published with (chat models often have two)."""
    stored = getattr(model.generation_config, "eos_token_id", None)
    listed = stored if isinstance(stored, list) else [stored]
    ends = dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if token is not None)
    if not ends:
        raise UserError("neither the tokenizer nor the model has an end-of-sequence token, so no answer could end")
    return list(ends)


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; the caller's random state is put back afterwards."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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


def _generate_batch(model: Any, encoded: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The new tokens of each row, padding included."""
    width = max(len(ids) for ids in encoded)
    input_ids = torch.full((len(encoded), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(encoded):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    output: Tensor = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _answer(tokenizer: PreTrainedTokenizerBase, index: int, row: list[int], settings: GenerationConfig) -> Generation:
    """The row up to and with its first end marker; what follows is padding."""
    ends = set(settings.eos_token_id)
    end = next((place for place, token in enumerate(row) if token in ends), None)
    token_ids = row if end is None else row[: end + 1]
    text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(prompt_index=index, text=str(text), token_ids=token_ids, finished=end is not None)
