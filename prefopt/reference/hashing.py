"""SHA-256 of tensors, whole however they are sharded, and of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from threading import Semaphore
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prefopt.scoring.zero import gathered

_THREADS = 4


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors with their names, dtypes and shapes, in any order.

    Every rank calls it with the same names, since tensors in pieces are gathered by all of them together. Only the main
    process hashes; the others get an empty text. No more than a few tensors are in memory a second time: the one on its
    way from the device, and those being hashed.
    """
    leaves = {leaf: part for name, value in tensors.items() for leaf, part in _leaves(name, value)}
    hashing, free = PartialState().is_main_process, Semaphore(_THREADS)
    seen: set[int] = set()
    hashes: dict[int, Future[str]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf in sorted(leaves):
            part = leaves[leaf]
            if id(part) in seen:  # tied weights have several names
                continue
            seen.add(id(part))
            with _whole(part) as whole:
                if hashing:
                    free.acquire()
                    # ZeRO-3 takes a parameter to pieces again when the block ends.
                    host = whole.detach().to("cpu", copy=hasattr(part, "ds_id"))
                    hashes[id(part)] = pool.submit(_hash_tensor, host)
                    hashes[id(part)].add_done_callback(lambda _: free.release())
    return hash_json({leaf: hashes[id(part)].result() for leaf, part in leaves.items()}) if hashing else ""


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of what `plain` makes of a value."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: names as text, tuples and sets as lists, the latter sorted."""
    return json.loads(json.dumps(value, default=_plain_leaf))


def _plain_leaf(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return value.value if isinstance(value, Enum) else str(value)


def _leaves(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the ones that a tensor of a quantised kind is made of, with how they are put together."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        yield name, value
        return
    parts, together = value.__tensor_flatten__()
    for part in parts:
        yield from _leaves(f"{name}.{part} {together}", getattr(value, part))


@contextmanager
def _whole(part: Tensor) -> Iterator[Tensor]:
    """A tensor without sharding, for the length of a block."""
    with gathered(part):
        yield part.full_tensor() if isinstance(part, DTensor) else part


def _hash_tensor(value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()
