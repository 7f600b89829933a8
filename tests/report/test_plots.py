"""The curves of a run: those that have figures, of a sensible size, and none when matplotlib is missing."""

from __future__ import annotations

import importlib.util
import math
import struct

import pytest

from prefopt.report.plots import MANY_POINTS, save_plots, smooth

NAMES = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected",
    "logratios/chosen", "logratios/rejected", "entropy", "learning_rate", "grad_norm",
)  # fmt: skip


def events(steps, names=NAMES):
    train = [{"step": step, **dict.fromkeys(names, 1.0 / step)} for step in range(1, steps + 1)]
    return [*train, {"step": steps, **{f"eval_{name}": 0.5 for name in names[:-2]}}]


def size_of(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_a_whole_run_has_every_panel_and_an_overview(tmp_path):
    files = save_plots(tmp_path, events(MANY_POINTS + 10))
    names = ["overview", "loss", "accuracy", "margins", "logratios", "entropy", "optimisation"]
    assert files == [tmp_path / "plots" / f"{name}.png" for name in names]
    assert all(size_of(path) == (900, 540) for path in files[1:])
    width, height = size_of(files[0])
    assert width > height > 600


def test_rewards_stand_in_where_there_are_no_log_ratios(tmp_path):
    files = save_plots(tmp_path, events(3, ("rewards/chosen", "rewards/rejected", "loss")))
    assert [path.stem for path in files] == ["overview", "loss", "rewards"]


def test_only_metrics_that_exist_are_drawn(tmp_path):
    files = save_plots(tmp_path, [{"step": 1, "eval_loss": 0.7}, {"step": 1, "train_runtime": 3.0}])
    assert [path.stem for path in files] == ["overview", "loss"]


def test_nothing_to_draw(tmp_path):
    assert save_plots(tmp_path, []) == []
    assert not (tmp_path / "plots").exists()


def test_numbers_that_are_not_finite_do_not_break_a_plot(tmp_path):
    metrics = [
        {"step": step, "loss": math.nan if step % 7 == 0 else 1.0, "grad_norm": math.inf} for step in range(1, 70)
    ]
    assert len(save_plots(tmp_path, metrics)) == 3


def test_without_matplotlib_one_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert save_plots(tmp_path, events(3)) == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert 'pip install "prefopt[report]"' in said
    assert not (tmp_path / "plots").exists()


def test_smoothing_keeps_level_length_and_gaps():
    assert smooth([2.0] * 9, 3) == [2.0] * 9
    assert smooth([0.0, 3.0, 0.0], 1) == [1.5, 1.0, 1.5]
    gap = smooth([1.0, math.nan, 3.0], 1)
    assert math.isnan(gap[1])
    assert gap[0] == pytest.approx(1.0)
