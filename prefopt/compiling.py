"""`torch_compile`: the blocks of a backbone are compiled, each in place.

Rows and scored tokens differ from step to step, so shapes are dynamic; what gathers and scores tokens keeps its own
code. Modules, names and checkpoints stay as they are, which a wrapper around the whole model would change.
"""

from __future__ import annotations

from typing import TypeVar

from accelerate.utils.other import is_repeated_blocks
from torch import nn
from transformers import TrainingArguments

Model = TypeVar("Model", bound=nn.Module | None)


def compile_blocks(model: Model, args: TrainingArguments) -> Model:
    """The model, with its repeated blocks compiled where `torch_compile` is set; None stays None.

    Call it before the model is prepared or sharded. Compilation happens when a block first runs.
    """
    if model is None or not args.torch_compile:
        return model
    backend = args.torch_compile_backend or "inductor"
    for blocks in filter(is_repeated_blocks, model.modules()):
        for block in blocks.children():
            block.compile(backend=backend, mode=args.torch_compile_mode, dynamic=True)
    return model
