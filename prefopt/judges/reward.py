"""A judge that is a reward model of transformers: a sequence classifier with one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

from prefopt.errors import UserError
from prefopt.models import load_reward_model, load_tokenizer


class RewardJudge:
    """`reward_model: NAME`. A conversation is rendered by the model's own chat template, a text is read as it is.

    `max_length`: most tokens that are read of prompt and answer, the last ones.
    """

    summary = ""

    def __init__(self, name: Any, *, dtype: str = "auto", batch_size: int = 16, max_length: int | None = None) -> None:
        self._name, self._batch_size, self._max_length = str(name), batch_size, max_length
        self._model = load_reward_model(self._name, dtype=dtype).to(PartialState().device).eval()
        self._tokenizer: Any = load_tokenizer(self._name)
        self._model.config.pad_token_id = self._tokenizer.pad_token_id

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        rows = [self._ids(prompt, answer) for answer in answers]
        scores: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            scores += self._batch(rows[start : start + self._batch_size])
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(f"judge {self._name}: gives {score} for the answer {answer!r}. Try dtype: float32")
        return scores

    def _ids(self, prompt: Any, answer: str) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt + answer)["input_ids"])
        else:
            if not getattr(self._tokenizer, "chat_template", None):
                raise UserError(f"judge {self._name}: has no chat template, and the prompts are conversations")
            turns = [*prompt, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[-self._max_length :] if self._max_length else ids

    def _batch(self, rows: Sequence[list[int]]) -> list[float]:
        padded = self._tokenizer.pad(
            {"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt", verbose=False
        )
        with torch.no_grad():
            logits = self._model(**{name: value.to(self._model.device) for name, value in padded.items()}).logits
        return [float(score) for score in logits[:, 0].float().cpu()]
