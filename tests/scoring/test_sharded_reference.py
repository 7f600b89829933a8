"""Two processes under FSDP2: a sharded policy compared with a sharded reference, or with itself without its adapter."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from prefopt.scoring.model import DISTRIBUTION, causal_lm
from prefopt.scoring.modes import evaluating
from tests.scoring.families import assert_gradients_close, llama
from tests.scoring.test_adapters import lora
from tests.scoring.test_sharded import TIED, WORLD, rows_of, shard

STATISTICS = ("logp", "ref_logp", "forward_kl")


def reference_pass(reference: nn.Module, rows: dict[str, Tensor]) -> Any:
    if not isinstance(reference, PeftModel):
        with evaluating(reference):
            return reference(**rows, statistics=DISTRIBUTION)["distribution"]
    with evaluating(reference), reference.disable_adapter():
        return reference(**rows, statistics=DISTRIBUTION)["distribution"]


def compared(policy: nn.Module, reference: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """What a loss may make of the scores, `[M]`."""
    given = reference_pass(reference, rows)
    scores = policy(**rows, statistics=STATISTICS, reference=given)
    return scores["logp"] - scores["ref_logp"] + 0.5 * scores["forward_kl"]


def models(kind: str, layout: str) -> tuple[nn.Module, nn.Module]:
    """A policy and its reference, which is the policy itself where that has an adapter."""
    policy = llama(tie_word_embeddings=TIED[layout])
    if kind == "copy":
        reference = llama(seed=5, tie_word_embeddings=TIED[layout]).requires_grad_(False)
        return policy, reference
    adapted = lora(policy, **({"modules_to_save": ["lm_head"]} if kind == "trained head" else {}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.05) if parameter.requires_grad else None
    return adapted, adapted


def shard_both(policy: nn.Module, reference: nn.Module, layout: str) -> None:
    if isinstance(policy, PeftModel):
        if layout == "head apart":
            fully_shard(causal_lm(policy).get_output_embeddings())
        fully_shard(policy, reshard_after_forward=True)
        return
    for model in (policy, reference):
        shard(model, layout)


def compare(rank: int, kind: str, layout: str, empty_rank: int | None) -> None:
    policy, reference = models(kind, layout)
    whole_policy = copy.deepcopy(policy)
    whole_reference = whole_policy if reference is policy else copy.deepcopy(reference)
    everything = [compared(whole_policy, whole_reference, rows_of(other, empty_rank)) for other in range(WORLD)]
    (torch.cat(everything).sum() / WORLD).backward()
    expected = {name: p.grad for name, p in whole_policy.named_parameters() if p.grad is not None}
    shard_both(policy, reference, layout)
    for _ in range(2):
        policy.zero_grad()
        found = compared(policy, reference, rows_of(rank, empty_rank))
        found.sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}
        assert_gradients_close(gradients, expected)
    torch.testing.assert_close(found, everything[rank].detach(), rtol=0, atol=2e-6)


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    for empty_rank in (None, 1):
        for layout in TIED:
            compare(rank, "copy", layout, empty_rank)
        for kind in ("adapter", "trained head"):
            for layout in ("root alone", "head apart"):
                compare(rank, kind, layout, empty_rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path / "store"),), nprocs=WORLD)
