"""Parameters that DeepSpeed ZeRO-3 keeps in pieces, whole for as long as they are read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """A context in which these parameters are whole; does nothing without ZeRO-3.

    ZeRO-3 puts a parameter together when the forward of its own module is called, which scoring never does, so it is
    needed in the forward and again in the backward pass. TRL's helper knows which parameters are whole already.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    context: AbstractContextManager[Any] = maybe_gather_lm_head_ctx(*parameters)
    return context
