"""The metrics log and the results: strict JSON, complete, without repeats and without secrets."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefopt.errors import DataError
from prefopt.report.results import (
    MetricsFile,
    read_metrics,
    versions,
    without_secrets,
    write_metrics_line,
    write_results,
)

CANARY = "hf_" + "q" * 30


def strict_loads(text):
    """JSON as other languages read it: NaN and Infinity are errors."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run(callback, folder, *, first, last, rank_zero=True):
    """The events a trainer sends: training starts at step `first`, after what is logged every few steps."""
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    before = [{"loss": 1.0 / step, "epoch": step / 10, "step": step} for step in range(5, first + 1, 5)]
    state = TrainerState(is_world_process_zero=rank_zero, global_step=first, log_history=before)
    control = TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(first + 1, last + 1):
        state.global_step, state.epoch = step, step / 10
        if step % 5 == 0:
            callback.on_log(args, state, control, logs={"loss": 1.0 / step})


def test_numbers_that_are_not_finite_stay_visible(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics_line(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    assert strict_loads(path.read_text()) == {"step": 1, "loss": "nan", "grad_norm": "inf", "low": "-inf"}
    (event,) = read_metrics(path)
    assert math.isnan(event["loss"])
    assert event["grad_norm"] == math.inf
    assert event["low"] == -math.inf


def test_tensors_are_written_as_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics_line(path, {"step": 2, "loss": torch.tensor(0.5), "bad": torch.tensor(math.nan)})
    assert strict_loads(path.read_text()) == {"step": 2, "loss": 0.5, "bad": "nan"}


def test_no_file_has_no_events(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics_line(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_every_event_is_written_with_step_and_epoch(tmp_path):
    run(MetricsFile(), tmp_path, first=0, last=10)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 5, "epoch": 0.5, "loss": 0.2},
        {"step": 10, "epoch": 1.0, "loss": 0.1},
    ]


def test_other_ranks_write_nothing(tmp_path):
    run(MetricsFile(), tmp_path, first=0, last=10, rank_zero=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_resumed_run_repeats_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(MetricsFile(), tmp_path, first=0, last=20)
    path.write_text(path.read_text() + '{"step": 22, "lo')  # killed while writing, after a checkpoint at step 10
    run(MetricsFile(), tmp_path, first=10, last=30)
    run(MetricsFile(), tmp_path / "whole", first=0, last=30)
    assert path.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("last", [{"train_runtime": 3.0}, {"eval_loss": 0.5}])
def test_what_came_after_the_last_checkpoint_is_not_repeated(tmp_path, last):
    path = tmp_path / "metrics.jsonl"
    run(MetricsFile(), tmp_path, first=0, last=10)
    write_metrics_line(path, {"step": 10, **last})
    run(MetricsFile(), tmp_path, first=10, last=10)
    assert [event["step"] for event in read_metrics(path)] == [5, 10]


def test_a_new_run_in_an_old_folder_starts_a_new_log(tmp_path):
    run(MetricsFile(), tmp_path, first=0, last=20)
    run(MetricsFile(), tmp_path, first=0, last=5)
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [5]


def test_an_evaluation_before_training_is_kept(tmp_path):
    callback = MetricsFile()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    callback.on_log(args, TrainerState(is_world_process_zero=True), TrainerControl(), logs={"eval_loss": 0.7})
    run(callback, tmp_path, first=0, last=5)
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [0, 5]


def test_results_hold_figures_versions_and_devices(tmp_path):
    path = write_results(tmp_path, {"train": {"loss": 0.5, "bad": math.nan}, "base_model": "org/model"})
    results = strict_loads(path.read_text())
    assert results["train"] == {"bad": "nan", "loss": 0.5}
    assert results["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "accelerate", "peft"} <= set(results["versions"])
    assert results["devices"]
    assert list(results) == sorted(results)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr("prefopt.report.results.PACKAGES", ("torch", "no-such-package-here"))
    assert set(versions()) == {"python", "torch"}


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = write_results(tmp_path, {"train": {"loss": 1.0}})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, {"train": {"loss": 2.0}})
    assert strict_loads(path.read_text())["train"] == {"loss": 1.0}


def test_secrets_are_left_out(tmp_path):
    recipe = {
        "hub_token": CANARY,
        "token": "plain",
        "env": {"HF_TOKEN": CANARY},
        "nested": [{"WANDB_API_KEY": "k"}, f"use {CANARY} here"],
        "pad_token": "<pad>",
        "learning_rate": 1e-6,
    }
    clean = without_secrets(recipe)
    assert clean == {"nested": [{}, "use (removed) here"], "pad_token": "<pad>", "learning_rate": 1e-6}
    assert CANARY not in write_results(tmp_path, {"recipe": recipe}).read_text()
