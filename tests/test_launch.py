"""What a launcher was asked for, read from its command line, against what really runs."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from prefopt import launch
from prefopt.errors import UserError
from prefopt.launch import (
    Launch,
    asked_for,
    is_launched,
    parse_launch,
    prepare_environment,
    refuse_parallelism,
    split_options,
    starting_line,
)
from prefopt.recipe.read import known_names

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
CPU2 = str(CONFIGS / "cpu2.yaml")
SCRIPT = ["scripts/train.py", "configs/dpo.yaml"]
ACCELERATE = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]


@pytest.fixture(autouse=True)
def no_default_file(monkeypatch, tmp_path):
    """The launcher's settings of whoever runs the tests stay out of them."""
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    return tmp_path / "default_config.yaml"


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Launch()),
        (["--cpu", "--num_processes", "2"], Launch(2, None, True)),
        (["--cpu", "--num_processes=2"], Launch(2, None, True)),
        (["--multi_gpu", "--num_processes", "8"], Launch(8)),
        (["--config_file", CPU2], Launch(2, "MULTI_GPU", True)),
        (["--config_file", CPU2, "--num_processes", "3"], Launch(3, "MULTI_GPU", True)),
        (["--use_fsdp", "--num_processes", "4"], Launch(4, "FSDP")),
        (["--use_deepspeed"], Launch(None, "DEEPSPEED")),
        (["--config_file", str(CONFIGS / "fsdp2.yaml")], Launch(8, "FSDP")),
        (["--config_file", str(CONFIGS / "zero3.yaml")], Launch(8, "DEEPSPEED")),
        (["--config_file", str(CONFIGS / "one.yaml")], Launch(1, "NO")),
    ],
)
def test_what_the_launcher_was_told(options, expected):
    assert parse_launch([*ACCELERATE, *options, *SCRIPT]) == expected


@pytest.mark.parametrize(
    "spelling",
    [
        ["accelerate", "launch"],
        ["/venv/bin/python3.11", "/venv/bin/accelerate", "launch"],
        ["python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-u", "-m", "accelerate.commands.launch"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
)
def test_every_spelling_of_the_launcher(spelling):
    assert parse_launch([*spelling, "--num_processes", "2", *SCRIPT]) == Launch(2)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["bash"],
        ["python", *SCRIPT],
        ["torchrun", "--nproc_per_node", "2", *SCRIPT],
        ["accelerate", "test"],
        ["python", "accelerate_demo.py", "launch", "--num_processes", "2"],
        ["python", "train.py", "--note", "accelerate", "launch", "--num_processes", "2"],
    ],
)
def test_other_commands_ask_for_nothing(command):
    assert parse_launch(command) == Launch()


def test_words_of_the_script_are_not_the_launchers():
    assert parse_launch([*ACCELERATE, *SCRIPT, "--num_processes", "2", "--cpu"]) == Launch()


def test_the_default_file_counts_as_it_does_for_accelerate(no_default_file):
    no_default_file.write_text("num_processes: 4\ndistributed_type: FSDP\n")
    assert parse_launch([*ACCELERATE, *SCRIPT]) == Launch(4, "FSDP")
    assert parse_launch([*ACCELERATE, "--config_file", CPU2, *SCRIPT]) == Launch(2, "MULTI_GPU", True)
    assert parse_launch([*ACCELERATE, "--cpu", *SCRIPT]) == Launch(None, None, True)


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert parse_launch([*ACCELERATE, "--config_file", str(tmp_path / "empty.yaml"), *SCRIPT]) == Launch()


def test_the_parent_is_asked(monkeypatch):
    command = [*ACCELERATE, "--num_processes", "5", *SCRIPT]
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: command))
    assert asked_for() == Launch(5)


def test_a_parent_that_may_not_be_asked(monkeypatch):
    def refused(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refused)
    assert asked_for() == Launch()


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "use_cpu", "accelerator", "expected"),
    [
        ("2", False, False, "true"),
        ("2", True, True, "true"),
        ("2", False, True, None),
        ("1", True, False, None),
        (None, False, False, None),
    ],
)
def test_ranks_without_an_accelerator_are_told(world, use_cpu, accelerator, expected, monkeypatch):
    for name, value in {"WORLD_SIZE": world, "ACCELERATE_USE_CPU": None}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "asked_for", lambda: Launch(2, None, use_cpu))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    states = []
    monkeypatch.setattr(launch, "PartialState", lambda **settings: states.append(settings))
    assert prepare_environment() == Launch(2, None, use_cpu)
    assert os.environ.get("ACCELERATE_USE_CPU") == expected
    assert states == ([{"cpu": True}] if expected else [])


# ---- what runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(monkeypatch):
    def set_state(processes=1, kind=DistributedType.NO, device="cpu"):
        state = SimpleNamespace(num_processes=processes, distributed_type=kind, device=torch.device(device))
        made: list[timedelta] = []
        monkeypatch.setattr(launch, "PartialState", lambda timeout: made.append(timeout) or state)
        return made

    return set_state


def test_one_line_says_what_runs(running):
    running(1)
    assert starting_line(Launch()) == "launch: 1 process, cpu"
    running(2, DistributedType.MULTI_CPU)
    assert starting_line(Launch(2, "MULTI_GPU", True)) == "launch: 2 processes, MULTI_CPU, cpu"


def test_ranks_wait_for_one_another_as_long_as_the_recipe_says(running):
    """The state that is made first is the one that counts."""
    made = running(1)
    starting_line(Launch())
    starting_line(Launch(), 7200)
    assert made == [timedelta(minutes=30), timedelta(hours=2)]


@pytest.mark.parametrize(("asked", "run"), [(2, 1), (1, 2), (8, 4)])
def test_another_number_of_processes(asked, run, running):
    running(run)
    message = rf"{asked} processes were asked for, but the number running is {run}.*cpu2\.yaml.*torchrun"
    with pytest.raises(UserError, match=message):
        starting_line(Launch(asked))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_nothing_is_sharded_on_a_cpu(kind, running):
    running(2, DistributedType.MULTI_CPU)
    with pytest.raises(UserError, match=f"{kind} was asked for, but on a CPU.*cpu2"):
        starting_line(Launch(2, kind))


def test_sharding_on_accelerators_is_said_by_its_name(running, monkeypatch):
    """PartialState knows only of several GPUs; FSDP comes with the Accelerator."""
    running(8, DistributedType.MULTI_GPU, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert starting_line(Launch(8, "FSDP")) == "launch: 8 processes, FSDP, H200"
    assert starting_line(Launch(8, "MULTI_GPU")) == "launch: 8 processes, MULTI_GPU, H200"


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_parallelism_inside_a_row(name):
    sizes = {"tp_size": 1, "cp_size": 1, "sp_size": 1}
    refuse_parallelism(SimpleNamespace(parallelism_config=None))
    refuse_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(**sizes)))
    with pytest.raises(UserError, match=f"`{name}` above 1"):
        refuse_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(**{**sizes, name: 2})))


# ---- the files that come with the package ---------------------------------------------------------------------------


FILES = sorted(CONFIGS.glob("*.yaml"))


def test_the_files_are_found():
    assert {"cpu2", "ddp", "fsdp2", "one", "zero2", "zero3"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_every_file(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= 1 and config.machine_rank == 0
    assert config.mixed_precision in ("no", "bf16")  # a bare `no` would be read as False
    assert parse_launch([*ACCELERATE, "--config_file", str(file), *SCRIPT]) == Launch(
        config.num_processes, config.distributed_type.value, bool(config.use_cpu)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "processes"), [(["--cpu", "--num_processes", "2"], None), (["--config_file", CPU2], 2)]
)
def test_a_real_launch(options, processes, tmp_path):
    """Refused where accelerate starts one process in silence; two ranks where it starts two."""
    script = tmp_path / "script.py"
    script.write_text(
        "from prefopt.launch import prepare_environment, starting_line\n"
        "from prefopt.cli import _leave_together\n"
        "print(starting_line(prepare_environment()), flush=True)\n"
        "_leave_together()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=180
    )
    if processes is None:
        assert found.returncode != 0
        assert "2 processes were asked for, but the number running is 1" in found.stderr
    else:
        assert found.returncode == 0, found.stderr
        assert found.stdout.count(f"launch: {processes} processes, MULTI_CPU, cpu") == processes


# ---- one command line for launcher and run --------------------------------------------------------------------------


def test_options_of_the_launcher_are_told_from_those_of_the_run():
    options = ["--num_processes", "2", "--loss.beta", "0.3", "--cpu", "--mixed-precision=bf16", "--learning_rate=1e-5"]
    assert split_options(options, known_names()) == (
        ["--num_processes", "2", "--cpu", "--mixed-precision=bf16"],
        ["--loss.beta", "0.3", "--learning_rate=1e-5"],
    )


def test_a_name_that_both_know_is_the_run_s():
    options = ["--gradient_accumulation_steps", "4", "--debug", "underflow_overflow"]
    assert split_options(options, known_names()) == ([], options)


def test_who_was_launched(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for command, expected in (([*ACCELERATE, *SCRIPT], True), (["bash"], False)):
        monkeypatch.setattr(psutil, "Process", lambda pid, command=command: SimpleNamespace(cmdline=lambda: command))
        assert is_launched() == expected
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_launched()
