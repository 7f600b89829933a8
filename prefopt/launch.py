"""What was launched, compared with what was asked for.

On a CPU accelerate starts one process for `--cpu --num_processes 2` and for `distributed_type: MULTI_CPU`, and runs
`distributed_type: FSDP` as plain DDP, each without a word. A run that is not what its user thinks is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from prefopt.errors import UserError

TIMEOUT = 1800.0  # transformers' own
_SHARDED = ("FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class Launch:
    """What a launcher was told: processes in all, the kind of distribution, and whether to stay on the CPU."""

    num_processes: int | None = None
    distributed_type: str | None = None
    use_cpu: bool = False


def prepare_environment() -> Launch:
    """Make accelerate see what the launcher was asked for; call it before anything asks for a device.

    The launcher of several processes does not pass `use_cpu` on, and without it ranks on a machine with no accelerator
    each believe they are alone.
    """
    asked = asked_for()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (asked.use_cpu or not torch.accelerator.is_available()):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        # Only `Accelerator` reads the variable, and the state that is made first is the one that counts.
        PartialState(cpu=True)
    return asked


def asked_for() -> Launch:
    """What `accelerate launch`, if it is our parent, was asked to start; an empty `Launch` otherwise."""
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return Launch()
    return parse_launch(command)


def parse_launch(command: Sequence[str]) -> Launch:
    """Read a launcher's command line, and the configuration file it names or falls back to."""
    given = _launch_arguments(list(command))
    if given is None:
        return Launch()
    arguments, _ = launch_command_parser().parse_known_args(given)
    settings = _config_file(arguments.config_file, arguments.cpu)
    kind = settings.get("distributed_type")
    if arguments.use_fsdp or arguments.use_deepspeed:
        kind = "FSDP" if arguments.use_fsdp else "DEEPSPEED"
    processes = arguments.num_processes or settings.get("num_processes")
    return Launch(processes, kind, bool(arguments.cpu or settings.get("use_cpu")))


def is_launched() -> bool:
    """Whether a launcher started this process."""
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        command = []
    return "LOCAL_RANK" in os.environ or _launch_arguments(command) is not None


def split_options(options: Sequence[str], ours: Collection[str]) -> tuple[list[str], list[str]]:
    """Options of one command line as those of `accelerate launch` and the rest; names in `ours` are never its own."""
    known = {
        name: action.nargs != 0
        for action in launch_command_parser()._actions
        for name in action.option_strings
        if name.lstrip("-").replace("-", "_") not in ours
    }
    launcher: list[str] = []
    rest: list[str] = []
    waiting = list(options)
    while waiting:
        option = waiting.pop(0)
        name, equals, _ = option.partition("=")
        side = launcher if name in known else rest
        side.append(option)
        if known.get(name) and not equals and waiting:
            side.append(waiting.pop(0))
    return launcher, rest


def starting_line(asked: Launch, timeout: float = TIMEOUT) -> str:
    """One line that says what runs. Raises `UserError` when it is not what was asked for.

    `timeout`: seconds after which ranks give up waiting for one another, as `ddp_timeout` of a recipe.
    """
    # The process group is made here, and would else have the back end's own timeout: ten minutes with NCCL.
    state = PartialState(timeout=timedelta(seconds=timeout))
    if asked.num_processes is not None and asked.num_processes != state.num_processes:
        raise UserError(
            f"launch: {asked.num_processes} processes were asked for, but the number running is {state.num_processes}. "
            "On a CPU, `--cpu` and MULTI_CPU start only one: use `--config_file configs/accelerate/cpu2.yaml`, or "
            "`torchrun --nproc_per_node 2 scripts/train.py ...`."
        )
    if asked.distributed_type in _SHARDED and state.device.type == "cpu":
        raise UserError(
            f"launch: {asked.distributed_type} was asked for, but on a CPU accelerate runs plain DDP and shards "
            "nothing: use `--config_file configs/accelerate/cpu2.yaml`."
        )
    kind = asked.distributed_type if asked.distributed_type in _SHARDED else state.distributed_type.value
    device = torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type
    count = f"{state.num_processes} processes, {kind}" if state.num_processes > 1 else "1 process"
    return f"launch: {count}, {device}"


def refuse_parallelism(accelerator: Accelerator) -> None:
    """Raise `UserError` for parallelism that splits a sequence or a layer over ranks: rows are dealt to all ranks."""
    parallel = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if parallel is not None and getattr(parallel, name, 1) > 1:
            raise UserError(f"launch: `{name}` above 1 is not supported. Use data parallelism: DDP, FSDP or ZeRO.")


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch`, in each of its spellings; None for another command."""
    # The program itself, or what an interpreter with its options runs.
    script = next((place for place, word in enumerate(command) if place and not word.startswith("-")), 0)
    for place, word in ((place, command[place]) for place in (0, script) if place < len(command)):
        name, rest = Path(word).name.removesuffix(".exe"), command[place + 1 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return rest
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return rest[1:]
    return None


def _config_file(path: str | None, cpu: bool) -> dict[str, Any]:
    """The launcher's settings: the file named, else the user's default one, which `--cpu` ignores."""
    file = Path(path or default_config_file)
    if not file.is_file() or (path is None and cpu):
        return {}
    return yaml.safe_load(file.read_text()) or {}
