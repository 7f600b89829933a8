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

from prefopt.errors import DataError, UserError

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
) -> list[Generation]:
    """Sample `samples_per_prompt` answers to every prompt, ordered by prompt.

    A prompt is a text, encoded as the tokenizer encodes any text, or a list of messages, rendered by the chat
    template with the header of the answer. Sampling is from the model's own distribution at `temperature`, cut to the
    likeliest `top_p`: whatever the model's stored generation settings add (top-k, repetition penalties) is set aside,
    so answers are on-policy. `temperature=0` takes the likeliest token. The same arguments give the same answers, and
    the caller's random state and the model's mode are left as they were. `batch_size` counts answers; prompts of
    similar length share a batch. Raises `UserError` for arguments out of range and `DataError` for an empty prompt.
    """
    _check(samples_per_prompt, max_new_tokens, temperature, top_p, batch_size)
    encoded = [prompt_ids(tokenizer, prompt, where=index) for index, prompt in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
    jobs = [index for index in order for _ in range(samples_per_prompt)]
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    answers: list[Generation] = []
    with _sampling_mode(model, settings, seed), tqdm(total=len(jobs), desc="sampling", unit="answer", disable=None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            rows = _generate_batch(model, [encoded[index] for index in batch], settings)
            answers += [_answer(tokenizer, index, row, settings) for index, row in zip(batch, rows, strict=True)]
            bar.update(len(batch))
    return sorted(answers, key=lambda answer: answer.prompt_index)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, where: int = 0) -> list[int]:
    """The token ids a model continues; `where` is the prompt's position, for the error when there are none."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [dict(message) for message in prompt]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    if not ids:
        raise DataError(f"prompt {where} has no tokens, so there is nothing to continue; give it some text")
    return list(ids)


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
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True, **{"do_sample": False, **sampling}
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
def _sampling_mode(model: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """Eval mode, seeded, and with the model's stored generation settings out of the way; all put back afterwards."""
    # `generate` fills every setting left open from the one stored on the model; an adapter model has two.
    owners = list(dict.fromkeys([model, getattr(model, "get_base_model", lambda: model)()]))
    stored = [owner.generation_config for owner in owners]
    training = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        for owner in owners:
            owner.generation_config = settings
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        for owner, config in zip(owners, stored, strict=True):
            owner.generation_config = config
        for module, mode in training.items():
            module.training = mode


def _generate_batch(model: PreTrainedModel, encoded: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
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
    return Generation(prompt_index=index, text=text, token_ids=token_ids, finished=end is not None)
