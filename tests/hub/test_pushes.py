"""The queue of pushes: in the background, the latest first in line, and nothing that raises."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from prefopt.hub import pushes as module
from prefopt.hub.pushes import Push, Pushes, read_record, wait_for_pushes
from prefopt.hub.sending import Destination
from tests.hub.server import TOKEN

HERE = Destination("me/model")


class Gate:
    """Files that can be collected only when it opens."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.open.wait(60)
        return files("gate")


def files(text: str):
    return {"model.safetensors": text.encode()}


def push(name: str, collect=None, held: Path | None = None) -> Push:
    return Push(name, HERE, name, collect or (lambda: files(name)), held)


@pytest.fixture
def pushes(tmp_path, hub) -> Pushes:
    return Pushes(tmp_path, "every_save")


def test_a_push_does_not_keep_its_caller_waiting(hub, pushes):
    gate = Gate()
    future = pushes.submit(push("first", gate))
    assert gate.reached.wait(60)
    assert not future.done()
    gate.open.set()
    pushes.wait()
    assert future.result().files.keys() == {"model.safetensors"}
    assert hub.commits("me/model") == ["first"]


def test_while_one_is_under_way_the_latest_waits_and_the_others_are_left_out(hub, pushes, capsys):
    gate = Gate()
    pushes.submit(push("step 1", gate))
    assert gate.reached.wait(60)
    second, third = pushes.submit(push("step 2")), pushes.submit(push("step 3"))
    assert second.result() is None
    gate.open.set()
    wait_for_pushes()
    assert hub.commits("me/model") == ["step 1", "step 3"]
    assert third.result().oid
    assert (
        "push: step 2 is left out: the push before it is still under way, and step 3 comes next"
        in capsys.readouterr().out
    )


def test_with_every_all_of_them_are_sent_in_order(hub, tmp_path):
    pushes, gate = Pushes(tmp_path, "every_save", every=True), Gate()
    pushes.submit(push("1", gate))
    assert gate.reached.wait(60)
    for name in ("2", "3", "4"):
        pushes.submit(push(name))
    gate.open.set()
    pushes.wait()
    assert hub.commits("me/model") == ["1", "2", "3", "4"]


def test_held_files_are_let_go_whatever_becomes_of_the_push(hub, pushes, tmp_path):
    held = [tmp_path / f"_push-{step}" for step in (1, 2, 3)]
    for folder in held:
        folder.mkdir()
    gate = Gate()
    pushes.submit(push("1", gate, held[0]))
    assert gate.reached.wait(60)
    pushes.submit(push("2", held=held[1]))
    pushes.submit(push("3", collect=lambda: 1 / 0, held=held[2]))
    gate.open.set()
    pushes.wait()
    assert not any(folder.exists() for folder in held)


def test_a_failure_is_a_line_and_a_note_and_the_next_push_is_sent(hub, pushes, tmp_path, capsys):
    hub.may_write = False
    assert pushes.submit(push("step 1")).result(60) is None
    hub.may_write = True
    assert pushes.submit(push("step 2")).result(60) is not None
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("push:")]
    assert said[0] == (
        "push: step 1 is not on the Hub: the token may not write to me/model (403). Use one with the right to write "
        f"there. The files are in {tmp_path}; to send them: prefopt push {tmp_path} --repo me/model"
    )
    assert said[1].startswith("push: step 2 is on the Hub: 1 file, 6 bytes, in me/model (commit ")
    record = read_record(tmp_path)
    assert (record["hub_model_id"], record["hub_strategy"]) == ("me/model", "every_save")
    failed, sent = record["pushes"]
    assert "403" in failed["failed"]
    assert sent["oid"] == hub.repositories["me/model"].branches["main"][-1][0]
    assert len(sent["files"]["model.safetensors"]) == 64
    assert TOKEN not in (tmp_path / "push.json").read_text()


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), MemoryError(), OSError(28, "No space left"), KeyError("x")])
def test_no_error_gets_out(hub, pushes, error):
    def fail():
        raise error

    assert pushes.submit(push("step 1", fail)).result(60) is None
    assert pushes.submit(push("step 2")).result(60) is not None


def test_a_folder_that_cannot_be_written_stops_no_push(hub, pushes, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(module, "write_whole", refuse)
    assert pushes.submit(push("step 1")).result(60) is not None


def test_a_screen_that_is_gone_stops_no_push(hub, pushes, monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(module, "say", gone)
    assert pushes.submit(push("step 1", lambda: 1 / 0)).result(60) is None
    assert pushes.submit(push("step 2")).result(60) is not None


def test_the_repository_is_made_ready_without_files(hub, pushes, capsys):
    pushes.submit(Push("the repository", HERE))
    pushes.wait()
    assert hub.files("me/model") == {}
    assert "push: the run goes to me/model" in capsys.readouterr().out
    hub.tokens.clear()
    pushes.submit(Push("the repository", HERE))
    pushes.wait()
    said = capsys.readouterr().out
    assert "push: the repository is not on the Hub: the Hub refuses the token (401)" in said
    assert "It is tried again with the first push" in said
