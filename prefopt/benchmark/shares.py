"""Where the time of a step goes: matrix products, attention and the rest of the backbone, head, optimizer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from prefopt.scoring.model import causal_lm

PARTS = ("matrix products", "attention", "rest of the backbone", "head", "optimizer", "everything else")
_MODEL, _BACKBONE = "prefopt benchmark: model", "prefopt benchmark: backbone"
_NODE = "autograd::engine::evaluate_function: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def shares_of(trainer: Any) -> dict[str, float]:
    """The share of each of `PARTS` in the second epoch of a run; the first is the warm-up.

    Of elapsed time, profiling included: it weighs on small operations, so `everything else` is an upper bound.
    """
    watch = _SecondEpoch()
    trainer.add_callback(watch)
    inner = causal_lm(trainer.model)
    with _ranged(inner, _MODEL), _ranged(inner.base_model, _BACKBONE):
        trainer.train()
    seconds = Counter(dict.fromkeys(PARTS, 0.0))
    events = [event for event in watch.profile.events() if event.device_type.name == "CPU"]
    rooms = _rooms_of_sequences(events)
    for event in events:
        seconds[_part(event, rooms)] += event.self_cpu_time_total / 1e6
    inside = sum(seconds[part] for part in PARTS[:-1])
    return {**{part: seconds[part] / watch.seconds for part in PARTS[:-1]}, PARTS[-1]: 1 - inside / watch.seconds}


class _SecondEpoch(TrainerCallback):
    """Profiles from the second epoch's begin to the end of training."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)
        self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch and not self.seconds:
            self.profile.start()
            self.seconds = -time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds:
            self.seconds += time.perf_counter()
            self.profile.stop()


@contextmanager
def _ranged(module: nn.Module, name: str) -> Iterator[None]:
    """Every forward of a module under a name of its own in the profile."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _lineage(event: Any) -> Iterator[Any]:
    """An event and what it ran in, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_room(event: Any) -> str:
    names = {each.name for each in _lineage(event)}
    if _BACKBONE in names:
        return "backbone"
    return "head" if _MODEL in names else "elsewhere"


def _rooms_of_sequences(events: list[Any]) -> dict[int, str]:
    """The room in which the forward operation of each autograd node ran; a node has the number of its operation."""
    return {
        event.sequence_nr: _forward_room(event)
        for event in events
        if event.sequence_nr >= 0 and not any(each.name.startswith(_NODE) for each in _lineage(event))
    }


def _part(event: Any, rooms: dict[int, str]) -> str:
    lineage = list(_lineage(event))
    if any(each.name.startswith("Optimizer.") for each in lineage):
        return "optimizer"
    node = next((each for each in lineage if each.name.startswith(_NODE)), None)
    # Nodes without an operation of their own add up the gradients of parameters.
    room = _forward_room(event) if node is None else rooms.get(node.sequence_nr, "backbone")
    if room != "backbone":
        return "head" if room == "head" else "everything else"
    if any("scaled_dot_product" in each.name or "ScaledDotProduct" in each.name for each in lineage):
        return "attention"
    return "matrix products" if event.name in _PRODUCTS else "rest of the backbone"
