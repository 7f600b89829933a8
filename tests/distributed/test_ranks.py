"""Two ranks give the weights and the figures of one, and see each row once."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefopt.data import drafting
from prefopt.errors import UserError
from tests.distributed.worker import CASES, RESUMED, logged, resume, run
from tests.helpers import text_pairs
from tests.launching import on_two_ranks
from tests.training import make_trainer

OF_THE_SPLIT = {"padding", "unique_tokens"}  # figures that say how rows were laid out, not what came of them


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory):
    """Where two ranks leave their runs."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(ranks_folder):
    """What each of two gloo ranks found for every case; a hang is a failure."""
    folder = ranks_folder
    on_two_ranks("-m", "tests.distributed.worker", str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(tmp_path, two_ranks, name):
    one = run(CASES[name], str(tmp_path), world=1)
    ranks = [found[name] for found in two_ranks]
    torch.testing.assert_close(ranks[0]["weights"], one["weights"], atol=1e-6, rtol=0)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_seen_once_an_epoch(two_ranks, name):
    epochs = zip(*(found[name]["visits"] for found in two_ranks), strict=True)
    for parts in epochs:
        assert sorted(row for part in parts for row in part) == list(range(CASES[name]["rows"]))


@pytest.mark.parametrize("name", CASES)
def test_logged_figures_are_those_of_one_rank(tmp_path, two_ranks, name):
    one = run(CASES[name], str(tmp_path), world=1)
    for ours, theirs in zip(two_ranks[0][name]["logs"], one["logs"], strict=True):
        # Before the first step a margin is rounding, and so is its sign.
        told = OF_THE_SPLIT | ({"rewards/accuracies"} if abs(theirs.get("rewards/margins", 1.0)) < 1e-6 else set())
        for key in theirs.keys() - told:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    figures = {key for key in one["evaluation"] if "/" in key or key.endswith(("loss", "entropy"))}
    for key in figures:
        assert two_ranks[1][name]["evaluation"][key] == pytest.approx(one["evaluation"][key], rel=1e-5, abs=5e-6), key


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, two_ranks):
    """In the middle of the second epoch, on one rank and on two: the stock loop loses the epoch there."""
    for found in (resume(str(tmp_path), world=1), *(rank["resume"] for rank in two_ranks)):
        assert torch.equal(found["whole"], found["resumed"])
        assert found["tokens"][0] == found["tokens"][1]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks):
    for found in two_ranks:
        assert found["interrupted"] == {"status": 143, "stopped after": 7, "same": True}


def test_one_rank_tokenises_and_the_other_reads(two_ranks):
    assert [found["drafted"] for found in two_ranks] == [40, drafting._CHECKED]


def test_both_ranks_hear_a_refusal(two_ranks):
    first, second = (found["refused"] for found in two_ranks)
    assert first == second
    assert "per_device_train_batch_size: 2 in the checkpoint, 4 now" in first


def test_a_run_of_two_ranks_goes_on_with_one_when_that_is_allowed(tmp_path, two_ranks, ranks_folder, capsys):
    """The same rows a step give the same steps, up to rounding; without a word it is refused."""
    run = tmp_path / "run"
    shutil.copytree(ranks_folder / "interrupted" / "whole", run)
    whole = load_file(run / "checkpoint-12" / "model.safetensors")
    lines = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    for folder in run.glob("checkpoint-1*"):
        shutil.rmtree(folder)
    settings = {**RESUMED, "per_device_train_batch_size": 2}
    with pytest.raises(UserError, match=r"\n  world_size: 2 in the checkpoint, 1 now\n"):
        make_trainer(run, text_pairs(13), **settings).train(resume_from_checkpoint="auto")
    allowed = {"gradient_accumulation_steps": 2, "allow_change": ["world_size", "gradient_accumulation_steps"]}
    trainer = make_trainer(run, text_pairs(13), **settings, **allowed)
    trainer.train(resume_from_checkpoint="auto")
    assert "resume: allowed: world_size: 2 in the checkpoint, 1 now" in capsys.readouterr().out
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, whole.get(name, value), atol=1e-5, rtol=0)
    for ours, theirs in zip(logged(trainer), lines, strict=False):
        for name in theirs.keys() - OF_THE_SPLIT:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert trainer.state.global_step == 12


def test_all_ranks_stop_and_name_the_rows_of_the_one_that_failed(two_ranks):
    first, second = (found["stop"] for found in two_ranks)
    assert first == second
    assert "step 1: the loss is not finite" in first
    assert len(re.search(r"\[(.*)\]", first).group(1).split(",")) == 2
