"""Prompts as the token ids a model continues: the same ids that they have in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.drafts import TextEncoder
from prefopt.data.formats import Example
from prefopt.data.problems import Where
from prefopt.data.templates import ChatRenderer, require_template
from prefopt.errors import DataError

Prompt = str | Sequence[Mapping[str, Any]] | Example
"""A text, a list of messages, or an example, whose tools and template arguments then count as well."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """The token ids the model continues, for each prompt; none is empty.

    Messages are rendered by the chat template, with `chat_template_kwargs`, up to and with the header of the answer.
    Raises `DataError` for a prompt without tokens or one the template refuses, and `UserError` without a template.
    """
    examples = [_example(prompt, row) for row, prompt in enumerate(prompts)]
    encoder, renderer = TextEncoder(tokenizer), ChatRenderer(tokenizer, chat_template_kwargs)
    texts = [_text(tokenizer, renderer, example) for example in examples]
    ids = encoder.many(texts)
    encoded = []
    for example, text in zip(examples, texts, strict=True):
        # A template has already written whatever special tokens the model wants.
        prefix = encoder.prefix if example.kind == "text" else []
        encoded.append([*prefix, *ids[text]])
        if not encoded[-1]:
            raise DataError(f"{example.where}: the prompt has no tokens, so there is nothing to continue. Give it text")
    return encoded


def messages_or_text(prompt: Prompt) -> Any:
    """A prompt as JSON holds it."""
    said = prompt.prompt if isinstance(prompt, Example) else prompt
    return said if isinstance(said, str) else [dict(message) for message in said]


def _example(prompt: Prompt, row: int) -> Example:
    if isinstance(prompt, Example):
        return prompt
    return Example("", messages_or_text(prompt), where=Where("prompts", row))


def _text(tokenizer: PreTrainedTokenizerBase, renderer: ChatRenderer, example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    require_template(tokenizer, example.where)
    return renderer.text(example, "prompt", example.prompt, generation_prompt=True)
