"""Scores from inside a causal language model's own forward.

DDP, FSDP, PEFT and accelerate all wrap `model(...)`: parameters are gathered, adapters switched and gradients reduced
around that call. So the head is applied in there, to scored tokens only, and what comes out is `[M]` numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import UserError
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.head import statistics_of
from prefopt.scoring.zero import gathered

# The power to which a configuration field enters the factor on the logits.
_SCALE_POWER = {
    "logit_scale": 1,  # Cohere
    "output_multiplier": 1,  # Muse
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite; MiniCPM3, which divides the hidden states instead
}
_SCALE_POWER_IN = {
    ("hyperclovax", "logits_scaling"): 1,
    ("mpt", "logit_scale"): 0,  # in the configuration, never applied
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM

_SCORING_ARGUMENTS = (
    inspect.Parameter("source", inspect.Parameter.KEYWORD_ONLY, default=None),
    inspect.Parameter("target", inspect.Parameter.KEYWORD_ONLY, default=None),
    inspect.Parameter("statistics", inspect.Parameter.KEYWORD_ONLY, default=("logp",)),
    inspect.Parameter("reference", inspect.Parameter.KEYWORD_ONLY, default=None),
)
DISTRIBUTION = ("distribution",)
"""`statistics` of a reference pass: not numbers, but what the policy's forward needs to compare itself with it."""


def enable_scoring(model: nn.Module) -> None:
    """Let a causal language model score tokens: `model(input_ids=..., source=..., target=...) -> {name: [M]}`.

    With the keyword `source` (flat positions in `[R * T]` whose hidden states predict) the call runs the backbone on
    `input_ids` `[R, T]`, `attention_mask`, `position_ids` and whatever else the backbone takes, and returns the
    `statistics` (see `score_tokens`) of the tokens `target` `[M]`. Without it, the call is the ordinary forward.
    Statistics that compare with a reference want it as `reference`: a `Distribution`, which another model's call with
    `statistics=DISTRIBUTION` returns as `{"distribution": ...}`, or `ExpectedRows`, where the head is frozen.

    Only this instance changes: no module, parameter or class is replaced, and a deep copy scores with its own weights.
    Call it before `accelerate.prepare`; a second call does nothing. Raises `UserError` for a model that has no backbone
    and head to take apart.
    """
    inner = causal_lm(model)
    _refuse_architecture(inner)
    if hasattr(inspect.unwrap(inner.forward), "makes_scores"):
        return
    if "forward" in vars(inner):
        raise UserError(
            f"the forward of this {type(inner).__name__} is already replaced, by another library or by a `device_map` "
            "over several devices. Load the model plainly, on one device, and let prefopt enable scoring first."
        )
    inner.forward = MethodType(_scoring_forward(type(inner)), inner)


def _scoring_forward(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """A function to be bound to an instance of `kind`.

    It keeps nothing of the instance: a captured bound method would go on to use the original's weights in a deep copy.
    """

    def forward(
        self: PreTrainedModel,
        *args: Any,
        source: Tensor | None = None,
        target: Tensor | None = None,
        statistics: tuple[str, ...] = ("logp",),
        reference: Distribution | ExpectedRows | None = None,
        **inputs: Any,
    ) -> Any:
        if source is None:
            return type(self).forward(self, *args, **inputs)
        if target is None or args:
            raise TypeError("scoring needs `target` beside `source`, and takes keyword arguments only")
        # PEFT fills in what was not passed.
        given = {name: value for name, value in inputs.items() if value is not None}
        hidden = self.base_model(**{**given, "use_cache": False})[0].flatten(0, 1).index_select(0, source)
        with _distribution(self, hidden, lasting=statistics == DISTRIBUTION) as distribution:
            if statistics == DISTRIBUTION:
                return {"distribution": distribution}
            return statistics_of(distribution, target, statistics, reference)

    # `generate` reads from the signature whether to pass a mask and positions.
    own = inspect.signature(kind.forward)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = own.replace(parameters=[*parameters, *_SCORING_ARGUMENTS, *rest])  # type: ignore[attr-defined]
    forward.makes_scores = True  # type: ignore[attr-defined]
    return forward


@contextmanager
def _distribution(model: PreTrainedModel, hidden: Tensor, *, lasting: bool) -> Iterator[Distribution]:
    """The model's distributions at `hidden` `[M, H]`, with a head that is whole in the block, or also after it."""
    with _unsharded(_output_head(model)) as head, gathered(head.weight, getattr(head, "bias", None)):
        weight, bias = head.weight, getattr(head, "bias", None)
        if lasting and _in_pieces(model, head):
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
        yield Distribution(hidden, weight, bias, *head_transform(model.config))


def _in_pieces(model: PreTrainedModel, head: Any) -> bool:
    """Whether FSDP2 or ZeRO-3 takes the head's weight apart again after the forward."""
    return hasattr(head.weight, "ds_id") or any(isinstance(part, FSDPModule) for part in (head, *model.modules()))


@contextmanager
def _unsharded(head: Any) -> Iterator[Any]:
    """The head with whole parameters, also where FSDP2 made it a unit of its own.

    FSDP gathers a unit when its forward is called, which scoring never does. Gathered by hand, the unit stays so until
    the end of the backward pass, where FSDP reduces its gradient over ranks with all others. (`full_tensor()` would
    give the same scores, but each rank would keep the gradient of its own tokens alone.)
    """
    by_hand = isinstance(head, FSDPModule)
    if by_hand:
        head.unshard()
    yield head
    if by_hand and not torch.is_grad_enabled():
        head.reshard()


def head_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What a model family does to its logits after the head: `(scale, softcap)`, the scale first.

    Families spell it in many ways, and some mean opposite things by one name; `check_scores` finds what is missing.
    """
    scale, softcap = 1.0, None
    for name, usual in _SCALE_POWER.items():
        power = _SCALE_POWER_IN.get((config.model_type, name), usual)
        value = getattr(config, name, None)
        if value is not None and power != 0:
            scale *= float(value) ** power
    for name in _SOFTCAPS:
        value = getattr(config, name, None)
        softcap = softcap if value is None else float(value)
    return scale, softcap


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside PEFT, DDP and `torch.compile` wrappers. Raises `UserError` if there is none."""
    *_, inner = _unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            f"{type(inner).__name__} is not a transformers model. Pass a model that "
            "`AutoModelForCausalLM.from_pretrained` returns, or a PEFT model around one."
        )
    return inner


def _output_head(model: PreTrainedModel) -> Any:
    """The module that holds the head's `weight` and maybe `bias`; with PEFT possibly a wrapper that picks the copy."""
    return model.get_output_embeddings()


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and everything it wraps, outermost first."""
    yield model
    inner: Any = None
    if isinstance(model, PeftModel):
        inner = model.get_base_model()
    else:  # `torch.compile`; DDP, FSDP 1, DeepSpeed
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if inner is not None:
        yield from _unwrapped(inner)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise `UserError` for a model, as wrapped so far, whose scores would be wrong or could not be computed.

    Refused: prompt-learning adapters, an adapter on the output head, `DataParallel`, and what `enable_scoring` refuses.
    """
    for wrapper in _unwrapped(model):
        if isinstance(wrapper, nn.DataParallel):
            raise UserError(
                "torch.nn.DataParallel cuts flat lists of scored tokens between devices. Start one process per device: "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one device."
            )
        if isinstance(wrapper, PeftModel):
            _refuse_prompt_learning(wrapper)
    inner = causal_lm(model)
    _refuse_architecture(inner)
    _refuse_head(_output_head(inner))


def _refuse_prompt_learning(model: PeftModel) -> None:
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UserError(
                f"adapter `{name}` ({type(config).__name__}) puts virtual tokens before the text, so every score would "
                "belong to another token. Use an adapter inside the layers, such as LoRA."
            )


def _refuse_architecture(model: PreTrainedModel) -> None:
    kind, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder model; prefopt trains decoder-only models.")
    if config.get_text_config() is not config or any(hasattr(config, f"{side}_config") for side in ("vision", "audio")):
        raise UserError(f"{kind} is a multimodal model; prefopt trains text-only models. Load its text part by itself.")
    if model.base_model is model or _output_head(model) is None:
        raise UserError(
            f"{kind} does not show its backbone (`base_model`) and output head (`get_output_embeddings`), so scored "
            "tokens cannot be taken out between them. Use a model class that `AutoModelForCausalLM` loads."
        )


def _refuse_head(head: Any) -> None:
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            "an adapter lies on the output head, whose weight is read without it, so it would neither count nor train. "
            "Leave the head out of `target_modules`, or train it in full: `modules_to_save: [lm_head]`."
        )
    if not torch.is_floating_point(head.weight):
        raise UserError("the output head is quantized. Keep it in 16 or 32 bits (`llm_int8_skip_modules`).")
