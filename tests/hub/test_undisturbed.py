"""Whatever the Hub does, a run leaves the same on the disk, says what did not arrive, and tells no token."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from prefopt import cli
from prefopt.hub.pushes import read_record
from tests.helpers import text_pairs
from tests.hub.runs import MODEL, PUSH, REPORT, STATE, TOKENIZER, train, train_in_python, within
from tests.hub.server import TOKEN
from tests.training import make_trainer, weights

FAULTS = {
    "the repository cannot be made": lambda hub: hub.fail("create", for_ever=500),
    "no right to write": lambda hub: setattr(hub, "may_write", False),
    "an expired token": lambda hub: hub.tokens.clear(),
    "preparing fails": lambda hub: hub.fail("preupload", for_ever=503),
    "uploads fail": lambda hub: hub.fail("upload", for_ever=500),
    "uploads fail after the first": lambda hub: hub.fail("upload", None, for_ever=500),
    "the connection breaks": lambda hub: hub.fail("upload", for_ever="cut"),
    "other bytes arrive": lambda hub: hub.fail("upload", for_ever="hash"),
    "the commit fails": lambda hub: hub.fail("commit", for_ever=502),
    "the commit is cut": lambda hub: hub.fail("commit", for_ever="cut"),
    "a slow Hub": lambda hub: hub.fail("create", for_ever=("wait", 0.3)),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> torch.Tensor:
    return weights(train_in_python(tmp_path_factory.mktemp("plain") / "first").model)


@pytest.mark.parametrize("fault", FAULTS)
def test_training_never_suffers_and_a_retry_sends_what_is_missing(tmp_path, hub, undisturbed, capsys, fault):
    FAULTS[fault](hub)
    folder = tmp_path / "first"
    trainer = train_in_python(folder, push_to_hub=True, hub_strategy="checkpoint")
    sent = trainer.push_to_hub()
    assert torch.equal(weights(trainer.model), undisturbed)
    said = capsys.readouterr().out
    if fault == "a slow Hub":
        assert sent is not None
        return
    assert sent is None
    assert f"to send them: prefopt push {folder} --repo first" in said
    assert "failed" in read_record(folder)["pushes"][-1]
    remote = hub.repositories.get("me/first")
    assert remote is None or hub.commits("me/first") == []
    stored = list(hub.stored)

    hub.faults.clear()
    hub.may_write, hub.tokens = True, {TOKEN}
    assert cli.main(["push", str(folder)]) == 0
    assert sorted(hub.files("me/first")) == sorted(
        [*MODEL, *TOKENIZER, "README.md", "results.json", *within("last-checkpoint", MODEL + TOKENIZER + STATE)]
    )
    assert len(set(hub.stored)) == len(hub.stored), "an object travelled twice"
    assert hub.stored[: len(stored)] == stored


def test_no_hub_at_all(tmp_path, hub, undisturbed, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    trainer = train_in_python(tmp_path / "first", push_to_hub=True)
    assert trainer.push_to_hub() is None
    assert torch.equal(weights(trainer.model), undisturbed)
    assert "the repository is not on the Hub: offline mode is on (HF_HUB_OFFLINE)" in capsys.readouterr().out
    assert hub.requests == []


def test_a_recipe_run_ends_well_without_the_hub(here, hub, capsys):
    hub.fail("commit", for_ever=500)
    folder = train(*PUSH)
    said = capsys.readouterr().out
    assert "push: the model is not on the Hub: the Hub answered 500" in said
    assert "to send them: prefopt push runs/first --repo me/first" in said
    assert {path.name for path in folder.iterdir() if path.name.startswith("_")} == set()
    hub.faults.clear()
    assert cli.main(["push", "runs/first", "--repo", "me/first"]) == 0
    assert sorted(hub.files("me/first")) == sorted(MODEL + TOKENIZER + REPORT)


def test_a_checkpoint_in_shards_is_no_model_to_push(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("prefopt.hub.trainer.holds_weights", lambda files: False)
    train_in_python(tmp_path / "first", push_to_hub=True)
    assert hub.commits("me/first") == []
    assert list((tmp_path / "first").glob("_push-*")) == []


def test_neither_construction_nor_a_save_waits_for_the_hub(tmp_path, hub):
    """A Hub that says nothing until the training is over: were it waited for, the test would not end."""
    over, waited, answer = threading.Event(), [], hub.create
    hub.create = lambda **request: (waited.append(over.wait(30)), answer(**request))[1]
    trainer = make_trainer(
        tmp_path / "first", text_pairs(8), save_strategy="steps", save_steps=1, max_steps=3, push_to_hub=True
    )
    steps = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (save(*args), steps.append(len(hub.took("commit"))))
    trainer._finish_current_push = over.set  # the end of training is the only place that waits
    trainer.train()
    assert steps == [0, 0, 0]
    trainer.pushes.wait()
    assert waited == [True, True]
    assert hub.commits("me/first") == ["Training in progress, step 3"]


def test_a_stage_is_done_before_its_push_is(here, hub):
    """On several ranks the others wait for the mark: were it to come after the push, they would wait for the Hub."""
    marks, over, answer = [], threading.Event(), hub.commit

    def commit(**request):
        while not (done := "done" in Path("runs/first/stage.json").read_text()) and not over.wait(0.02):
            pass
        marks.append(done)
        return answer(**request)

    hub.commit = commit
    timer = threading.Timer(30, over.set)
    timer.start()
    train(*PUSH, "--hub_strategy", "end")
    timer.cancel()
    assert marks == [True]
    assert hub.commits("me/first") == ["End of training"], "and the process waits for the push"


def test_rotation_takes_nothing_from_a_push_under_way(tmp_path, hub):
    rotated, answer = threading.Event(), hub.preupload
    hub.preupload = lambda **request: (rotated.wait(60), answer(**request))[1]
    folder = tmp_path / "first"
    trainer = make_trainer(
        folder, text_pairs(8), save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1,
        push_to_hub=True, hub_strategy="all_checkpoints", hub_always_push=True,
    )  # fmt: skip
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert {path.name for path in folder.glob("_push-*")} == {"_push-1", "_push-2", "_push-3"}
    rotated.set()
    trainer.pushes.wait()
    assert {name.split("/")[0] for name in hub.files("me/first") if "/" in name} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-3",
    }  # fmt: skip
    assert list(folder.glob("_push-*")) == []


def test_what_a_killed_run_held_is_let_go(tmp_path, hub):
    (tmp_path / "first" / "_push-7").mkdir(parents=True)
    make_trainer(tmp_path / "first", text_pairs(8), push_to_hub=True)
    assert not (tmp_path / "first" / "_push-7").exists()


def test_a_disk_that_is_full_at_the_push_is_said_and_the_run_goes_on(tmp_path, hub, undisturbed, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    trainer = train_in_python(tmp_path / "first", push_to_hub=True)
    assert torch.equal(weights(trainer.model), undisturbed)
    assert "push: step 1 is not on the Hub: OSError: [Errno 28] No space left on device" in capsys.readouterr().out
    assert list((tmp_path / "first").glob("_push-*")) == []


# Tokens


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_the_token_is_in_no_file_no_line_and_no_body(tmp_path, hub, source, capsys, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    given = {}
    if source == "argument":
        monkeypatch.delenv("HF_TOKEN")
        given = {"hub_token": TOKEN}
    hub.fail("upload", 401, None, 500)
    trainer = train_in_python(tmp_path / "first", push_to_hub=True, hub_strategy="all_checkpoints", **given)
    trainer.push_to_hub()
    assert hub.files("me/first"), "the token was good"
    said = "".join(capsys.readouterr()) + caplog.text
    shown = [repr(trainer.args), str(trainer.args), repr(trainer.pushes), repr(trainer._destination()), said]
    assert not [text for text in shown if TOKEN in text]
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in paths if TOKEN.encode() in path.read_bytes()]
    for request in hub.requests:
        request.headers = {name.lower(): value for name, value in request.headers.items()}
        authorization = request.headers.pop("authorization", None)
        assert request.route != "upload" or authorization is None, "the store behind the Hub is another machine"
        assert TOKEN not in f"{request.path} {request.headers}"
        assert TOKEN.encode() not in request.body
