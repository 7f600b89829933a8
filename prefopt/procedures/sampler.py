"""What samples the answers of a round: the model itself, or vLLM over the folder it lies in."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from prefopt.generation.vllm_engine import VLLM
from prefopt.procedures.rounds import RoundSettings

if TYPE_CHECKING:
    from prefopt.recipe import Recipe


@contextmanager
def opened_vllm(
    recipe: Recipe, settings: RoundSettings, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Iterator[VLLM | None]:
    """vLLM over the model that a recipe starts from, or None where the settings do not ask for it; every rank calls.

    vLLM reads whole models: of one with an adapter each rank that samples keeps a merged copy in `folder` for as long.
    """
    if not settings.use_vllm:
        yield None
        return
    section, merged = recipe.model, folder / f"_merged-{PartialState().process_index}"
    source: str | Callable[[], str] = str(section.model_name_or_path)
    revision = section.model_revision
    if isinstance(model, PeftModel):
        source, revision = partial(_merged, model, merged), None
    options = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    memory = {
        "gpu_memory_utilization": settings.vllm_gpu_memory_utilization,
        "max_model_len": settings.vllm_max_model_length,
    }
    try:
        with VLLM(source, model, tokenizer, **options, **memory) as vllm:
            yield vllm
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _merged(model: PeftModel, folder: Path) -> str:
    """The folder, with a copy of the model in it that has its adapter merged."""
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    return str(folder)
