"""Two processes under FSDP2: scores and gradients of the sharded model are those of one process with all tokens."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from prefopt.scoring import score_tokens
from prefopt.scoring.selfcheck import check_scores
from tests.scoring.families import assert_gradients_close, batch, llama, own_logp, scored

WORLD = 2
TIED = {"head apart": False, "root alone": False, "norm with head": False, "tied": True}


def shard(model: PreTrainedModel, layout: str) -> None:
    """The ways accelerate, transformers and users cut a model into units."""
    if layout == "head apart":
        fully_shard(model.lm_head)
    if layout in ("norm with head", "tied"):
        for layer in model.model.layers:
            fully_shard(layer)
        shared = [model.model.embed_tokens] if layout == "tied" else []
        fully_shard([model.model.norm, *shared, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


def rows_of(rank: int, empty_rank: int | None) -> dict[str, Tensor]:
    rows = batch()
    rows["input_ids"] = rows["input_ids"].roll(rank, dims=0) * rows["attention_mask"]
    tokens = 0 if rank == empty_rank else 9 - 4 * rank
    return {**rows, "source": rows["source"][:tokens], "target": rows["target"][:tokens]}


def compare(rank: int, layout: str, empty_rank: int | None) -> None:
    model, rows = llama(tie_word_embeddings=TIED[layout]), rows_of(rank, empty_rank)
    whole = copy.deepcopy(model)
    everything = torch.cat([scored(whole, rows_of(other, empty_rank)) for other in range(WORLD)])
    (everything.sum() / WORLD).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    shard(model, layout)
    with torch.no_grad():
        before = scored(model, rows)
    for _ in range(2):
        model.zero_grad()
        found = scored(model, rows)
        found.sum().backward()
        gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        assert_gradients_close(gradients, expected)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    torch.testing.assert_close(found, scored(whole, rows), rtol=0, atol=1e-6)
    assert torch.equal(before, found)
    if empty_rank is None:
        check_scores(model, rows)
        torch.testing.assert_close(own_logp(model, rows), own_logp(whole, rows), rtol=0, atol=1e-6)


def refuse_outside_the_forward(rank: int) -> None:
    model = llama()
    fully_shard(model)
    hidden, targets = torch.randn(3, 32), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="sharded"):
        score_tokens(hidden, model.lm_head.weight, targets)
    with torch.no_grad():
        expected = score_tokens(hidden, model.lm_head.weight.full_tensor(), targets)["logp"]
        assert torch.equal(score_tokens(hidden, model.lm_head.weight, targets)["logp"], expected)


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    for layout in TIED:
        for empty_rank in (None, 1):
            compare(rank, layout, empty_rank)
    refuse_outside_the_forward(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, args=(str(tmp_path / "store"),), nprocs=WORLD)


def test_fsdp_changes_the_class_and_scoring_survives(tmp_path: Path) -> None:
    """One process; the head a unit of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, rows = llama(), batch()
        expected = scored(model, rows)
        shard(model, "head apart")
        assert type(model).__name__ != "LlamaForCausalLM"
        assert torch.equal(scored(model, rows), expected)
        torch.testing.assert_close(own_logp(model, rows), expected, rtol=1e-5, atol=1e-5)
    finally:
        dist.destroy_process_group()
