"""The scripts under examples/claims/, each with one seed: they run, and what they find points the way they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = Path(__file__).resolve().parents[1] / "examples" / "claims"


def run(name: str, folder: Path, *options: str) -> str:
    """What a script prints, run with one seed in an empty folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(CLAIMS / f"{name}.py"), "--seeds", "1", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(out: str, line: str) -> list[float]:
    """The numbers of the table's line that begins so, spreads left out."""
    found = next(each for each in out.splitlines() if each.startswith(line)).removeprefix(line)
    return [float(number) for number in re.findall(r"(?<![-\d.])-?\d+\.?\d*", re.sub(r"\+- \S+", "", found))]


def test_noisy_labels(tmp_path):
    out = run("noisy_labels", tmp_path)
    clean = figures(out, "0% ")[:3]
    assert max(clean) - min(clean) < 1e-9
    dpo, cdpo, rdpo = figures(out, "20% ")[:3]
    assert rdpo < dpo < cdpo
    assert "not seen: with flipped labels cDPO beats DPO" in out


def test_deterministic_preferences(tmp_path):
    out = run("deterministic_preferences", tmp_path)
    for beta, best in ((0.1, 0.964), (0.5, 0.563), (1.0, 0.448)):
        assert figures(out, f"dpo   {beta:g} ")[0] > 0.99
        assert figures(out, f"ipo   {beta:g} ")[0] == pytest.approx(best, abs=2e-3)
    assert out.splitlines()[-1].startswith("seen: IPO stays bounded")


def test_kto_against_dpo(tmp_path):
    out = run("kto_against_dpo", tmp_path)
    dpo, same, one = (
        figures(out, name)[0] for name in ("dpo, all pairs", "kto, the same answers", "kto, one answer a pair")
    )
    assert 0.95 * dpo < one <= 1.01 * dpo
    assert 0.95 * dpo < same <= 1.01 * dpo
    assert figures(out, "best possible")[0] > dpo


def test_easy_to_hard(tmp_path):
    out = run("easy_to_hard", tmp_path)
    gain, drift, _ = figures(out, "all at once")
    for way in ("easy to hard", "hard to easy", "random halves"):
        found, drifted, at_once = figures(out, way)
        assert drifted > drift  # every reference moves
        assert found == pytest.approx(at_once, abs=0.02) and found == pytest.approx(gain, abs=0.1)


def test_frontier(tmp_path):
    """Only that it runs, to the table, the verdicts and the curves: what it shows takes an hour."""
    out = run("frontier", tmp_path, "--quick")
    runs = json.loads((tmp_path / "runs/frontier/frontier.json").read_text())
    lines = (
        "DPO",
        "f-DPO, forward KL",
        "TDPO1",
        "TDPO2, alpha 0.25",
        "TDPO2, alpha 0.5",
        "DPO, lr 1.2e-4",
        "DPO, beta 1",
    )
    assert tuple(each["label"] for each in runs) == lines
    assert all(re.search(rf"^{re.escape(line)} +1 ", out, re.MULTILINE) for line in lines)
    assert all([point["step"] for point in each["curve"]] == [0, 2, 4] for each in runs)
    assert all(each["curve"][0]["kl"] == 0 < each["curve"][-1]["kl"] < 2 for each in runs)
    assert all(each["held_out"]["seqkl/rejected"] > 0 for each in runs)
    assert "not shown: no pair of runs passed KL 2" in out


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["embedded", "real"])
def test_spin_reviews(tmp_path, request, real):
    """Only that it runs, to the table and the verdicts: what it shows takes some minutes."""
    data = ("--data", str(request.getfixturevalue("shared_data"))) if real else ()
    out = run("spin_reviews", tmp_path, "--quick", *data)
    for name in ("start ", "round 1 ", "round 3 ", "supervised, as many steps", "one round, as many steps"):
        assert len(figures(out, name)) == 6
    assert figures(out, "start ")[3] == pytest.approx(0, abs=1e-6)
    assert len(re.findall("seen: ", out)) == 7
    rounds = json.loads((tmp_path / "runs/spin_reviews/seed-0/spin/results.json").read_text())["rounds"]
    assert all("measured/sentiment" in row for row in rounds)


@pytest.mark.slow
def test_stepwise_reviews(tmp_path):
    """Only that it runs, to the table and the verdicts, with as many steps on every way."""
    out = run("stepwise_reviews", tmp_path, "--quick")
    for name in ("start ", "easy to hard", "hard to easy", "random thirds", "all at once"):
        assert len(figures(out, name)) == 5
    assert len(re.findall("seen: ", out)) == 9


@pytest.mark.slow
def test_segments(tmp_path):
    """Only that it runs, to the table and the verdicts: what it shows takes a quarter of an hour."""
    out = run("segments", tmp_path, "--quick")
    runs = json.loads((tmp_path / "runs/segments/segments.json").read_text())
    assert all(f"\n{name} " in out for name in runs) and len(runs) == 10
    base, *others = (found[0] for found in runs.values())
    assert base["talk_kl"] == pytest.approx(0, abs=1e-6)
    assert all(0 < other["talk_kl"] < 1 for other in others)
    assert len(re.findall(r"^(?:not )?seen: ", out, re.MULTILINE)) == 4


@pytest.mark.slow
def test_near_identical_pairs(tmp_path):
    out = run("near_identical_pairs", tmp_path)
    (dpo, fell, margin), (dpop, kept, _) = (figures(out, name) for name in ("dpo ", "dpop, penalty 5 "))
    assert dpo < -1 < 0 < dpop
    assert fell > 0.6 > kept
    assert margin > 1


@pytest.mark.slow
def test_spin_rounds(tmp_path):
    """What holds whatever the seed: the models and their order in the table, and figures that are shares."""
    out = run("spin_rounds", tmp_path)
    for name in ("start ", "round 1 ", "round 3 ", "three more supervised epochs", "one round of six epochs"):
        valid, sentences, likelihood = figures(out, name)[:3]
        assert 0 <= valid <= sentences <= 1
        assert -4 < likelihood < -0.5
    assert len(re.findall("seen: ", out)) == 4


def test_every_script_is_tested_and_says_how_to_run_it():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for path in CLAIMS.glob("*.py"):
        if path.stem not in ("common", "reviews", "sentiment"):
            assert path.stem in tested
            assert f"python examples/claims/{path.name} [--seeds " in path.read_text()
