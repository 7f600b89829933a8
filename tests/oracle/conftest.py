"""Rows that ours and TRL's trainers are given: a tokenizer, rows, and a limit in tokens."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from prefopt.scratch import train_tokenizer
from tests import helpers


@pytest.fixture(scope="session")
def text(tokenizer):
    """Plain text, answers of 2 to 10 words."""
    return tokenizer, helpers.text_pairs(8), 1024


@pytest.fixture(scope="session")
def text_without_bos():
    """The same words; TRL's CPO trainer would put a bos before text of its own accord."""
    return helpers.make_tokenizer(bos=False), helpers.text_pairs(8), 1024


@pytest.fixture(scope="session")
def real(shared_data):
    """Real conversations, hundreds of tokens each, and a tokenizer trained on them."""
    with open(shared_data / "judged_pairs_eval.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 8)]
    rows = [{part: row[part] for part in ("prompt", "chosen", "rejected")} for row in rows]
    texts = [message["content"] for row in rows for part in row.values() for message in part]
    return train_tokenizer(texts, 600, chat=True), rows, 1024


@pytest.fixture(scope="session")
def cut(real):
    """The same conversations with a limit that cuts the end of most answers, but no prompt."""
    tokenizer, rows, _ = real
    prompts = (tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows)
    return tokenizer, rows, max(map(len, prompts)) + 20
