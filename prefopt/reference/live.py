"""Reference scores computed at the moment they are needed, through the same forward as the policy's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from peft import LoraModel, PeftModel
from torch import Tensor, nn

from prefopt.data.collation import MODEL_KEYS
from prefopt.errors import UserError
from prefopt.models import silence_dropout
from prefopt.scoring.distribution import Distribution
from prefopt.scoring.model import DISTRIBUTION, causal_lm, enable_scoring, refuse_unsupported
from prefopt.scoring.modes import evaluating

# Saved as a folder beside the adapter in training; a name that starts with `_` is not pushed to the Hub.
_REFERENCE_ADAPTER = "_reference"
_COPIED, _MOVING = "a frozen copy", "a copy"


class Reference(Protocol):
    """A source of reference scores.

    `is_start` says that the reference is the policy as training begins, so that every margin is 0 there.
    """

    is_start: bool

    @property
    def summary(self) -> str:
        """One line for the log."""

    def prepare(self, accelerator: Accelerator) -> None:
        """Place what the source holds; called once, after the accelerator exists."""

    def scores(self, policy: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`{"ref_logp": [M]}` for the tokens of `batch`, without gradient; empty when the loss needs none."""


class NoReference:
    """The loss reads no reference: nothing is loaded and nothing is scored."""

    is_start = False
    summary = "none: the loss does not need one"

    def prepare(self, accelerator: Accelerator) -> None:
        pass

    def scores(self, policy: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {}


class LiveReference(ABC):
    """A reference that is a model at hand, asked for log-probabilities or for its distributions batch by batch."""

    is_start: bool
    summary: str

    @abstractmethod
    def prepare(self, accelerator: Accelerator) -> None:
        """Place what the source holds; called once, after the accelerator exists."""

    def scores(self, policy: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"ref_logp": self._run(policy, batch, ("logp",))["logp"]}

    def distribution(self, policy: nn.Module, batch: dict[str, Any]) -> Distribution:
        """What the policy's forward needs to compare whole distributions at the tokens of `batch`."""
        return self._run(policy, batch, DISTRIBUTION)["distribution"]

    @abstractmethod
    def _run(self, policy: nn.Module, batch: dict[str, Any], statistics: tuple[str, ...]) -> dict[str, Any]:
        """The scoring forward of the reference, in evaluation mode and without gradient."""


class FrozenModel(LiveReference):
    """A second model, which is never trained: a copy of the starting policy, or one from another path."""

    def __init__(self, model: nn.Module, *, is_start: bool, summary: str) -> None:
        refuse_unsupported(model)
        enable_scoring(model)
        silence_dropout(model)
        self.model: Any = model.requires_grad_(False).eval()
        self.is_start = is_start
        self.summary = summary

    def prepare(self, accelerator: Accelerator) -> None:
        # The sharded back ends need a wrapper of their own for a model without an optimizer; TRL keeps them current.
        from trl.models.utils import prepare_deepspeed, prepare_fsdp

        if accelerator.state.deepspeed_plugin is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
            # An evaluation before training prepares the policy too (for autocast), unless a model is listed already.
            accelerator._models.remove(self.model)
        self.model.eval()

    def _run(self, policy: nn.Module, batch: dict[str, Any], statistics: tuple[str, ...]) -> dict[str, Any]:
        with torch.no_grad():
            return self.model(**plan_of(batch), statistics=statistics)


class AdapterOff(LiveReference):
    """The policy's own base weights, with its adapter off, or with a copy of the one training began with.

    `adds_nothing`: the adapter that training began with is the base itself.
    """

    is_start = True

    def __init__(self, adapter: str | None, *, copied: str = _COPIED, adds_nothing: bool = False) -> None:
        self.adapter, self.adds_nothing = adapter, adds_nothing or adapter is None
        kind = "its adapter off" if adapter is None else f"{copied} of the adapter it started with"
        self.summary = f"live: the policy with {kind}"

    def prepare(self, accelerator: Accelerator) -> None:
        pass

    def _run(self, policy: nn.Module, batch: dict[str, Any], statistics: tuple[str, ...]) -> dict[str, Any]:
        with evaluating(policy), self._switched(_peft_model(policy)):
            return policy(**plan_of(batch), statistics=statistics)

    @contextmanager
    def _switched(self, model: PeftModel) -> Iterator[None]:
        if self.adapter is None:
            with model.disable_adapter():
                yield
            return
        active, tuner = model.active_adapter, cast(LoraModel, model.base_model)
        try:
            tuner.set_adapter(self.adapter, inference_mode=True)
            yield
        finally:
            tuner.set_adapter(active)


class StartingPolicy(LiveReference):
    """The policy itself, which is its own reference until training moves it: no second model is held."""

    is_start = True
    summary = "live: the starting policy"

    def prepare(self, accelerator: Accelerator) -> None:
        pass

    def _run(self, policy: nn.Module, batch: dict[str, Any], statistics: tuple[str, ...]) -> dict[str, Any]:
        with evaluating(policy):
            return policy(**plan_of(batch), statistics=statistics)


def plan_reference(
    need: str,
    policy: nn.Module,
    *,
    fresh_adapter: bool,
    explicit: nn.Module | None = None,
    before_training: bool = False,
    moves: bool = False,
) -> Reference:
    """Choose the source for a loss's `need` (`none`, `logp` or `distribution`), before training moves the policy.

    `fresh_adapter`: the adapter was just made, so switching it off gives the starting policy, unless its configuration
    has it start elsewhere (PiSSA). `explicit`: a model that was asked for by name, whose margins need not be 0.
    `before_training`: all is scored before the policy moves, so that it needs no copy. `moves`: the reference will
    follow the policy, and needs weights of its own. Raises `UserError` for one that cannot be the reference.
    """
    copied = _MOVING if moves else _COPIED
    if need == "none":
        if explicit is not None:
            raise UserError("a reference model was given, but this loss reads none: leave it out")
        return NoReference()
    if explicit is not None:
        _check_explicit(explicit, policy)
        return FrozenModel(explicit, is_start=False, summary="live: the model given")
    if isinstance(policy, PeftModel) and not _trains_its_base(policy):
        adds_nothing = fresh_adapter and _starts_at_zero(policy)
        if before_training and not adds_nothing:
            return StartingPolicy()
        own = moves or not adds_nothing
        return AdapterOff(_copy_adapter(policy) if own else None, copied=copied, adds_nothing=adds_nothing)
    if before_training:
        return StartingPolicy()
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        raise UserError("ZeRO-3 holds the policy in pieces, which cannot be copied: name its path as `reference.model`")
    return FrozenModel(copy.deepcopy(policy), is_start=True, summary=f"live: {copied} of the starting policy")


def plan_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's scoring forward takes."""
    return {key: batch[key] for key in MODEL_KEYS if key in batch}


def _check_explicit(reference: nn.Module, policy: nn.Module) -> None:
    theirs, ours = causal_lm(reference), causal_lm(policy)
    if theirs is ours:
        raise UserError("the reference is the policy itself, which training moves: leave `ref_model` out to get a copy")
    if theirs.config.vocab_size != ours.config.vocab_size:
        raise UserError(
            f"the reference model has a vocabulary of {theirs.config.vocab_size} tokens and the policy one of "
            f"{ours.config.vocab_size}: their probabilities cannot be compared. Use a reference of the same family, "
            "with its embeddings resized as the policy's are."
        )


def _trains_its_base(model: PeftModel) -> bool:
    """Whether training moves weights outside the adapter (LoRA's `bias`), which switching it off would not restore."""
    active = model.active_adapter
    return any(p.requires_grad and active not in name.split(".") for name, p in model.named_parameters())


def _starts_at_zero(model: PeftModel) -> bool:
    """Whether a new adapter of this configuration adds nothing to the base; others are checked at the first step."""
    return getattr(model.peft_config[model.active_adapter], "init_lora_weights", True) in (True, "gaussian")


def _copy_adapter(model: PeftModel) -> str:
    """Freeze a copy of the active adapter beside it, and return the copy's name."""
    active = model.active_adapter
    if _REFERENCE_ADAPTER in model.peft_config:  # from an earlier trainer of this model
        model.delete_adapter(_REFERENCE_ADAPTER)
    config = copy.deepcopy(model.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        # PiSSA and its like rewrite the base when an adapter is added, a second time here.
        config.init_lora_weights = True
    with torch.random.fork_rng():  # what it draws is written over
        model.add_adapter(_REFERENCE_ADAPTER, config)
    for twin, parameter in adapter_twins(model, _REFERENCE_ADAPTER).values():
        twin.data = parameter.detach().clone()
        twin.requires_grad_(False)
    return _REFERENCE_ADAPTER


def adapter_twins(model: PeftModel, copied: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The weights of the adapter `copied` and those of the active one, by the names of the latter."""
    active, parameters = model.active_adapter, dict(model.named_parameters())
    twins = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        if active in parts:
            twins[name] = (parameters[".".join(copied if part == active else part for part in parts)], parameter)
    return twins


def _peft_model(policy: nn.Module) -> PeftModel:
    inner: Any = policy
    while not isinstance(inner, PeftModel):
        inner = inner.module
    return inner
