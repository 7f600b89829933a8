"""The floor: what any implementation of a DPO step needs, written by hand and not usable for training.

It reads as many tokens as there are when each prompt is read once, in full causal rows without padding and mask, sends
the tokens of the answers alone through the head, and moves the same optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.benchmark.setting import Shape, device

_BETA = 0.1


class Floor:
    """One step after the other over `windows`, each the lengths `[pairs, 3]` of prompt, chosen and rejected answer."""

    def __init__(self, shape: Shape, windows: Sequence[np.ndarray], precision: str) -> None:
        self.device = device()
        model: Any = shape.model()
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.windows = cycle(windows)
        self.precision = precision
        self._random = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """Forward, backward, clipping, optimizer."""
        lengths = next(self.windows)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self._loss(lengths)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Nothing is held open."""

    def _loss(self, lengths: np.ndarray) -> Tensor:
        ids = self._ids((len(lengths), -(-int(lengths.sum()) // len(lengths))))
        hidden = self.model.base_model(ids, use_cache=False)[0].flatten(0, 1)
        answers = torch.from_numpy(lengths[:, 1:].T.flatten().copy())  # chosen ones, then rejected ones
        scored = torch.linspace(0, len(hidden) - 1, int(answers.sum())).long()
        logits = F.linear(hidden.index_select(0, scored.to(self.device)), self.model.lm_head.weight)
        logp = -F.cross_entropy(logits, self._ids((len(scored),)), reduction="none")
        belongs = torch.repeat_interleave(torch.arange(len(answers)), answers).to(self.device)
        chosen, rejected = logp.new_zeros(len(answers)).index_add(0, belongs, logp).chunk(2)
        return -F.logsigmoid(_BETA * (chosen - rejected)).mean()

    def _ids(self, size: tuple[int, ...]) -> Tensor:
        ids = torch.randint(0, self.model.config.vocab_size, size, generator=self._random)
        return ids.to(self.device)
