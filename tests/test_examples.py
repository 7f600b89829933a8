"""Every example runs as its docstring says, and shows what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    """What an example prints when it is run in an empty folder, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dpo_in_python(tmp_path):
    out = run("dpo_in_python.py", tmp_path)
    before, after = map(float, re.findall(r"eval_rewards/margins\s+(\S+) -> +(\S+)", out)[0])
    assert before == 0
    assert after > 0.2
    assert (tmp_path / "runs/dpo_in_python/model.safetensors").is_file()


def test_add_your_own_loss(tmp_path):
    out = run("add_your_own_loss.py", tmp_path)
    assert float(re.findall(r"by hand: tensor\(\[(.+)\]\)", out)[0]) == pytest.approx((1 - 0.1 * 3) ** 2)
    assert float(re.findall(r"after training: (.+)", out)[0]) < 0.5


def test_score_without_a_trainer(tmp_path):
    out = run("score_without_a_trainer.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", out)]
    assert losses[0] == pytest.approx(0.6931)
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


def test_lora_and_push(tmp_path):
    out = run("lora_and_push.py", tmp_path)
    sent = out[out.index("To adapter: ") :]
    for file in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "results.json"):
        assert re.search(rf"^ +[\d,]+  {re.escape(file)}$", sent, re.MULTILINE)
    assert re.search(r"^Stays here: .*checkpoint-15/.*training_args\.bin", sent, re.MULTILINE)
    assert sent.endswith("Nothing was sent.\n")
    assert "library_name: peft" in (tmp_path / "runs/adapter/README.md").read_text()


def test_kto_from_thumbs(tmp_path):
    out = run("kto_from_thumbs.py", tmp_path)
    good, bad = (float(re.findall(rf"rewards/{side} +(\S+)", out)[0]) for side in ("chosen", "rejected"))
    assert good > 0.1 > -0.1 > bad
    assert "10 good answers at weight 1, 5 bad ones at weight 2" in out
    assert (tmp_path / "runs/kto_from_thumbs/model.safetensors").is_file()


def test_examples_are_short_and_all_tested():
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert path.name in tested
        assert len(text.splitlines()) < 60
        assert f"python examples/{path.name}" in text, "the docstring says how to run it"
