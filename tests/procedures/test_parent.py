"""`prefopt run` launches one stage after the other, passes signals on, and ends as the stage ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.errors import UserError
from prefopt.exit_status import STATUS_FILE, leave_status
from prefopt.procedures import MakeStage, make_plan, parent, run_plan
from prefopt.procedures.parent import run_launched
from prefopt.procedures.runner import MARK
from prefopt.recipe import load_recipe
from tests.helpers import make_model, make_tokenizer, text_pairs

# Stands for the launcher: writes down what it was called with and, as one that starts a worker, ends with 1 for any
# failure of it. The worker leaves the status that the test asks for.
LAUNCHER = """
import json, os, subprocess, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
worker = subprocess.run([sys.executable, "-c", os.environ["WORKER"], sys.argv[-1]])
sys.exit(1 if worker.returncode else 0)
"""


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """A function: what the worker does -> exit status of a run of two stages, and the calls of the launcher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setattr(parent, "_LAUNCH", (sys.executable, "launcher.py"))

    def run(worker: str) -> tuple[int, list[list[str]]]:
        monkeypatch.setenv("WORKER", worker)
        stages = [MakeStage(name, tmp_path / name, lambda: None, {}) for name in "ab"]
        status = run_launched(stages, ["--num_processes", "2"], ["my.yaml", "--loss.beta", "0.3"])
        calls = tmp_path / "calls.jsonl"
        return status, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


def test_each_stage_is_a_launch_of_its_own(launches):
    status, calls = launches("")
    assert status == 0
    common = ["--num_processes", "2", "--module", "prefopt", "train", "my.yaml", "--loss.beta", "0.3", "--stage"]
    assert calls == [[*common, "1"], [*common, "2"]]


def test_what_is_done_is_not_launched(launches, tmp_path, capsys):
    run_plan([MakeStage("a", tmp_path / "a", lambda: None, {})])
    status, calls = launches("")
    assert (status, [call[-1] for call in calls]) == (0, ["2"])
    assert "[1/2] a: done before" in capsys.readouterr().out


def test_a_stage_that_fails_ends_the_run_with_its_own_status(launches, capsys):
    leave = "from prefopt.exit_status import leave_status; leave_status(2); raise SystemExit(2)"
    status, calls = launches(leave)
    assert (status, len(calls)) == (2, 1)
    assert "[1/2] a: ended with status 2; the same command goes on from there" in capsys.readouterr().err


def test_a_stage_that_left_no_status_gives_the_launcher_s(launches):
    assert launches("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")[0] == 1


def test_other_settings_are_refused_before_anything_is_launched(launches, tmp_path):
    run_plan([MakeStage("a", tmp_path / "a", lambda: None, {"n": 1})])
    with pytest.raises(UserError, match="finished run with other settings"):
        launches("")
    assert not (tmp_path / "calls.jsonl").exists()


def test_the_first_process_that_fails_is_heard(tmp_path, monkeypatch):
    file = tmp_path / "status"
    monkeypatch.setenv(STATUS_FILE, str(file))
    leave_status(0)
    assert not file.exists()
    leave_status(2)
    leave_status(143)
    assert file.read_text() == "2"
    assert cli.main(["train", "no such recipe"]) == 2


def test_a_launched_process_launches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(parent, "run_launched", lambda *args: pytest.fail("launched"))
    assert cli.main(["run", "dpo"]) == 2
    assert "prefopt run starts `accelerate launch` itself" in capsys.readouterr().err


WAITS = """
import os, signal, sys, time
from prefopt.exit_status import leave_status

def end(number, frame):
    time.sleep(0.3)  # saves
    open("saved", "w").close()
    leave_status(143)
    os._exit(143)

signal.signal(signal.SIGTERM, end)
open("ready", "w").close()
time.sleep(60)
"""
PARENT = """
import sys
from pathlib import Path
from prefopt.procedures import MakeStage, parent

parent._LAUNCH = (sys.executable, "launcher.py")
stages = [MakeStage(name, Path(name), lambda: None, {}) for name in "ab"]
sys.exit(parent.run_launched(stages, [], ["my.yaml"]))
"""


def test_a_sigterm_reaches_the_workers_which_may_save(tmp_path):
    """It goes past the launcher, which would leave its worker behind, and the parent waits for both."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    environment = {**os.environ, "WORKER": WAITS}
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == 1


RECIPE = """\
model_name_or_path: tiny
data_files: pairs.jsonl
loss: {name: dpo}
output_dir: run
per_device_train_batch_size: 4
num_train_epochs: 1
procedure: {start: {}}
report_to: none
self_check: false
disable_tqdm: true
"""


@pytest.mark.slow
def test_a_whole_run_through_accelerate(tmp_path, monkeypatch):
    """Two stages on one process each; then one alone on two ranks, and a mistake with its own status."""
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefopt", "run", "r.yaml", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)

    done = run("--cpu", "--num_processes", "1", "--loss.beta", "0.3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("launch: 1 process") == 2
    again = run("--cpu", "--loss.beta", "0.3")
    assert (again.returncode, again.stdout.count("done before")) == (0, 2)
    assert make_plan(load_recipe("r.yaml", ["--loss.beta", "0.3"]))[1].folder == Path("run")
    assert json.loads(Path("run", MARK).read_text())["train"]["status"] == "done"
    wrong = run("--cpu", "--output_dir", "other", "--max_length", "3", "--max_dropped", "0")
    assert wrong.returncode == 2 and "lost to the length limit" in wrong.stderr and "Traceback" not in wrong.stderr
    config = Path(__file__).resolve().parents[2] / "configs" / "accelerate" / "cpu2.yaml"
    two = run("--config_file", str(config), "--output_dir", "two")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("launch: 2 processes") == 2
