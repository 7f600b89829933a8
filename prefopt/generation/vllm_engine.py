"""Sampling by vLLM, in a process of its own that ends, and gives the memory back, when the answers are there.

vLLM and transformers seldom agree on versions, so the process may have another interpreter: `PREFOPT_VLLM_PYTHON` names
it, and without it this one must have vLLM. A recipe cannot name it: a recipe alone never runs a program.

Every answer has its own seed, as in transformers' sampling, but vLLM draws other numbers from it: the two give other
answers of the same distribution, and each gives the same ones again up to rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.generation.sampling import Draw, Generation, Sampling, end_ids, to_generation

PYTHON = "PREFOPT_VLLM_PYTHON"
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_WORKER = Path(__file__).with_name("vllm_worker.py")
# A launcher's description of its own processes, which vLLM would take for one of its own.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "MASTER_PORT")
_TAIL = 2000


def interpreter() -> str:
    """The Python that has vLLM, which takes a moment to ask. Raises `UserError` where there is none."""
    python = os.environ.get(PYTHON) or sys.executable
    try:
        status = subprocess.run([python, "-I", "-c", _HAS_VLLM], capture_output=True, check=False).returncode
    except OSError as error:
        raise UserError(f"{PYTHON}: {python} does not start: {error}") from error
    if status:
        raise UserError(
            f"procedure.use_vllm: {python} has no vLLM. Name the Python of an environment that has it: "
            f"{PYTHON}=/path/to/bin/python"
        )
    return python


class VLLM:
    """vLLM over the model in a folder or on the Hub; a context whose end is that of its process.

    `source`: what vLLM loads, or what gives its name once it is needed; it must be the model `model`, whose end markers
    and precision are taken over. `options`: further arguments of `vllm.LLM`. The process starts at the first answers
    that are asked for, on the device of the rank that asks.
    """

    def __init__(
        self, source: str | Callable[[], str], model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        self._python, self._tokenizer, self._ends = interpreter(), tokenizer, end_ids(model, tokenizer)
        self._source = source
        self._arguments = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's own: answers are on-policy
            **{name: value for name, value in options.items() if value is not None},
        }
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        process, self._process = self._process, None
        if process is not None:
            if kind is None:
                assert process.stdin is not None
                process.stdin.close()  # the end of its work
            else:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._said.close()

    def sample(
        self, draws: Sequence[Draw], sampling: Sampling, *, sampled: Callable[[int], object] = lambda count: None
    ) -> list[Generation]:
        """The answers to `draws`, in their order. Raises `UserError` where vLLM fails, with its last words."""
        if self._process is None:
            source = self._source if isinstance(self._source, str) else self._source()
            self._process = self._started()
            self._asked({"model": source, **self._arguments})
        params = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": self._ends,
            "detokenize": False,
        }
        asked = {"params": params, "prompts": [draw.ids for draw in draws], "seeds": [draw.seed for draw in draws]}
        answers = [
            to_generation(self._tokenizer, draw.prompt_index, ids, self._ends)
            for draw, ids in zip(draws, self._asked(asked), strict=True)
        ]
        sampled(len(draws))
        return answers

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._python, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=worker_environment(os.environ, _device()),
        )

    def _asked(self, question: Mapping[str, Any]) -> Any:
        """The process's answer to one line."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            status = process.wait()
            self._said.seek(0)
            said = self._said.read()[-_TAIL:].strip()
            raise UserError(f"vLLM, run by {self._python}, ended with status {status}. It last said:\n{said}")
        return json.loads(line)


def worker_environment(environment: Mapping[str, str], device: str | None) -> dict[str, str]:
    """The environment of a process with one device, which is none of a launcher's."""
    own = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
    }
    # In one process its answers do not depend on how its own processes take turns.
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", **own}
    return own if device is None else {**own, "CUDA_VISIBLE_DEVICES": device}


def _device() -> str | None:
    """This rank's own GPU as its driver counts, or None without one."""
    if not torch.cuda.is_available():
        return None
    index, visible = PartialState().local_process_index, os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
