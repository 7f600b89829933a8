"""Every bit of a tensor counts, and no tensor is in memory twice for longer than it takes."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from prefopt.reference import hashing
from prefopt.reference.hashing import hash_json, hash_tensors, plain

VALUES = {
    "float": torch.tensor([1.0, 2.0]),
    "other": torch.tensor([1.0, 2.5]),
    "order": torch.tensor([2.0, 1.0]),
    "sign of zero": torch.tensor([-0.0, 0.0]),
    "zero": torch.tensor([0.0, 0.0]),
    "shape": torch.tensor([[1.0, 2.0]]),
    "column": torch.tensor([[1.0], [2.0]]),
    "bits": torch.tensor([1.0, 2.0]).view(torch.int32),
    "bfloat16": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "float16": torch.tensor([1.0, 2.0], dtype=torch.float16),
    "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False]),
    "byte": torch.tensor([1, 0], dtype=torch.uint8),
    "scalar": torch.tensor(1.0),
    "one": torch.tensor([1.0]),
    "empty": torch.zeros(0),
    "empty rows": torch.zeros(0, 3),
    "not a number": torch.tensor([torch.nan, 1.0]),
    "pair": TwoTensor(torch.ones(2), torch.zeros(2)),
    "pair turned": TwoTensor(torch.zeros(2), torch.ones(2)),
}


def test_every_tensor_has_a_hash_of_its_own():
    assert len({hash_tensors({"weight": value}) for value in VALUES.values()}) == len(VALUES)


@pytest.mark.parametrize("kind", VALUES)
def test_equal_tensors_have_equal_hashes(kind):
    value = VALUES[kind]
    assert hash_tensors({"weight": value}) == hash_tensors({"weight": value.clone()})


def test_the_layout_in_memory_does_not_count():
    value = torch.arange(6.0).view(2, 3)
    assert hash_tensors({"weight": value}) == hash_tensors({"weight": value.t().contiguous().t()})
    assert hash_tensors({"weight": value[:, 1:]}) == hash_tensors({"weight": value[:, 1:].contiguous()})


def test_names_count_and_their_order_does_not():
    first, second = torch.zeros(2), torch.ones(2)
    found = hash_tensors({"a": first, "b": second})
    assert found == hash_tensors({"b": second, "a": first})
    assert found != hash_tensors({"a": second, "b": first})
    assert found != hash_tensors({"a": first, "c": second})
    assert found != hash_tensors({"a": first})


def test_a_tied_tensor_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(hashing, "_hash_tensor", lambda value: read.append(value) or str(float(value.sum())))
    tied = torch.ones(2)
    found = hash_tensors({"head": tied, "embedding": tied})
    assert len(read) == 1
    assert found == hash_tensors({"head": tied, "embedding": tied.clone()})


def test_few_tensors_are_in_memory_twice(monkeypatch):
    """Only the one on its way from the device and those being hashed."""
    alive, most, lock = 0, 0, threading.Lock()

    def count(change):
        nonlocal alive, most
        with lock:
            alive += change
            most = max(most, alive)

    real = torch.Tensor.to

    def to(self, *args, **kwargs):
        copied = real(self, *args, **kwargs)
        count(1)
        weakref.finalize(copied, count, -1)
        return copied

    def slow(value):
        time.sleep(0.002)
        return "hash"

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(hashing, "_hash_tensor", slow)
    hash_tensors({str(number): in_pieces(torch.ones(2)) for number in range(100)})
    assert 1 < most <= hashing._THREADS + 2


def in_pieces(whole):
    """A parameter as ZeRO-3 holds it: empty, unless it is being gathered."""
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_id, parameter.kept = 0, whole
    return parameter


@contextmanager
def gathered(parameter):
    if not hasattr(parameter, "ds_id"):
        yield
        return
    parameter.data = parameter.kept.clone()
    yield
    parameter.data.zero_()  # as memory that is used for something else
    parameter.data = torch.zeros(0)


@pytest.mark.parametrize("is_main", [True, False])
def test_parameters_in_pieces_are_hashed_whole(monkeypatch, is_main):
    """Each is gathered once and by every rank, though only the main process has a use for it."""
    order = []

    @contextmanager
    def noted(parameter):
        order.append(parameter)
        with gathered(parameter):
            yield

    wholes = {name: torch.randn(50_000) for name in "cab"}
    expected = hash_tensors(wholes)
    monkeypatch.setattr(hashing, "gathered", noted)
    monkeypatch.setattr(hashing.PartialState, "is_main_process", is_main)
    with torch.no_grad():
        pieces = {name: in_pieces(whole) for name, whole in wholes.items()}
        found = hash_tensors({**pieces, "tied": pieces["a"]} if not is_main else pieces)
    assert found == (expected if is_main else "")
    assert [id(part) for part in order] == [id(pieces[name]) for name in "abc"]


def test_an_error_in_a_thread_is_an_error(monkeypatch):
    def fail(value):
        raise OSError("no memory")

    monkeypatch.setattr(hashing, "_hash_tensor", fail)
    with pytest.raises(OSError, match="no memory"):
        hash_tensors({str(number): torch.ones(1) for number in range(20)})


def test_json_has_one_spelling():
    assert plain({1: (2, {"b", "a"}), "dtype": torch.bfloat16}) == {"1": [2, ["a", "b"]], "dtype": "torch.bfloat16"}
    assert hash_json({"a": 1, "b": {"c", "d"}}) == hash_json({"b": ["c", "d"], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
