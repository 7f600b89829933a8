"""What samples the answers of a round: the model itself, or vLLM over the folder it lies in."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from prefopt.generation.vllm_engine import VLLM
from prefopt.procedures.rounds import RoundSettings
from prefopt.ranks import on_main

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@contextmanager
def opened_vllm(
    recipe: Recipe, settings: RoundSettings, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Iterator[VLLM | None]:
    """vLLM over the model that a recipe starts from, or None where the settings do not ask for it; every rank calls.

    vLLM reads whole models: one with an adapter lies in `folder` for as long, merged.
    """
    if not settings.use_vllm:
        yield None
        return
    section, merged = recipe.model, folder / "_merged"
    source, revision = str(section.model_name_or_path), section.model_revision
    if isinstance(model, PeftModel):
        on_main(lambda: copy.deepcopy(model).merge_and_unload().save_pretrained(merged))
        source, revision = str(merged), None
    options = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    memory = {
        "gpu_memory_utilization": settings.vllm_gpu_memory_utilization,
        "max_model_len": settings.vllm_max_model_length,
    }
    with VLLM(source, model, tokenizer, **options, **memory) as vllm:
        yield vllm
    PartialState().wait_for_everyone()
    on_main(lambda: shutil.rmtree(merged, ignore_errors=True))
