"""Whole processes with the stand-in as their Hub: several ranks, and readers who know nothing but a name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.runs import LORA, MODEL, REPORT, TOKENIZER, make_folder
from tests.hub.server import TOKEN, Hub
from tests.launching import TWO_RANKS

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (*TWO_RANKS, str(ROOT / "scripts" / "train.py"))
PUSH = ("my.yaml", "--push_to_hub", "true", "--hub_model_id", "me/first", "--hub_strategy", "checkpoint")

READ = """
import sys, torch
from prefopt.models import load_model, load_tokenizer
ids = torch.arange(5, 25)[None]
ours, theirs = (load_model(name).eval()(ids).logits for name in sys.argv[1:])
assert torch.equal(ours, theirs)
assert load_tokenizer(sys.argv[2]).eos_token == "</s>"
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "_hub")
    yield hub
    hub.close()


@pytest.fixture
def python(tmp_path, hub):
    """Run Python in a folder with a model, pairs and a recipe, as someone who is logged in at the stand-in."""
    work = tmp_path / "work"
    work.mkdir()
    make_folder(work)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "PREFOPT_STORE": str(tmp_path / "store"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str, status: int = 0) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    run.work, run.environment = work, environment
    return run


def weights(python, name: str) -> bytes:
    return (python.work / name / "model.safetensors").read_bytes()


def test_on_two_ranks_one_pushes_and_none_waits(hub, python):
    said = python(*TRAIN, *PUSH)
    assert said.count("push: the model is on the Hub") == 1
    assert set(MODEL + TOKENIZER + REPORT) <= set(hub.files("me/first"))
    ranks = {name for name in hub.files("me/first") if name.startswith(("last-checkpoint/rng", "last-checkpoint/log"))}
    assert len(ranks) == 4
    hub.may_write = False
    said = python(*TRAIN, *PUSH, "--output_dir", "runs/second")
    assert said.count("push: the model is not on the Hub: the token may not write to me/first (403)") == 1
    assert weights(python, "runs/first") == weights(python, "runs/second")


def test_a_run_that_waits_for_its_push_ends_at_once_when_told_to(hub, python):
    hub.fail("commit", for_ever=("wait", 120))
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *PUSH]
    with subprocess.Popen(command, cwd=python.work, env=python.environment, stdout=subprocess.PIPE, text=True) as run:
        assert any("push: the model is being sent" in line for line in run.stdout)
        run.terminate()
        assert run.wait(10) == -signal.SIGTERM
    hub.faults.clear()
    python("-c", "from prefopt.cli import main; main()", "push", "runs/first")
    assert set(MODEL + TOKENIZER + REPORT) <= set(hub.files("me/first"))


def test_a_reader_loads_model_and_adapter_by_their_names(hub, python):
    python("-c", "from prefopt.cli import main; main()", "push", "tiny", "--repo", "base")
    python(str(ROOT / "scripts" / "train.py"), *PUSH, *LORA, "--model_name_or_path", "me/base")
    python("-c", READ, "runs/first", "me/first")
    python("-c", READ, "tiny", "me/base")
