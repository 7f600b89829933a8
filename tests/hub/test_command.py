"""`prefopt push`: what it lists, what it sends, and how it refuses."""

from __future__ import annotations

import json

import pytest
import yaml

from prefopt import cli
from prefopt.checkpoints import seal
from prefopt.hub.pushes import read_record
from tests.hub.server import TOKEN


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder as a finished run leaves it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    recipe = {"hub_model_id": "me/wanted", "hub_private_repo": True, "hub_strategy": "checkpoint"}
    files = {
        "README.md": "---\ntags: [x]\n---\n\n# first\n",
        "config.json": "{}",
        "model.safetensors": "w" * 1234,
        "recipe.yaml": yaml.safe_dump(recipe),
        "training_args.bin": "pickle",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model.safetensors").write_text("older")
    seal(folder / "checkpoint-2", 2, {})
    return folder


@pytest.fixture
def push(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main(["push", *arguments]), *capsys.readouterr()

    return run


def test_a_dry_run_lists_and_sends_nothing(folder, hub, push):
    status, out, _ = push("runs/first", "--dry_run")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("To me/wanted (private): 6 files, ")
    assert "          1,234  model.safetensors" in lines
    assert "              5  last-checkpoint/model.safetensors" in lines
    assert lines[-2:] == ["Stays here: training_args.bin", "Nothing was sent."]
    assert hub.requests == []
    assert not (folder / "push.json").exists()


def test_a_dry_run_needs_no_hub_and_no_token(folder, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert push("runs/first", "--dry_run")[0] == 0


def test_the_folder_goes_where_its_recipe_wants_it(folder, hub, push):
    status, out, _ = push("runs/first")
    assert status == 0
    assert "Sent: 6 files" in out
    assert hub.url + "/me/wanted/commit/" in out
    assert hub.repositories["me/wanted"].private
    assert sorted(hub.files("me/wanted")) == [
        "README.md", "config.json", "last-checkpoint/manifest.json", "last-checkpoint/model.safetensors",
        "model.safetensors", "recipe.yaml",
    ]  # fmt: skip
    assert read_record(folder)["pushes"][0]["oid"]


def test_options_win_and_are_remembered(folder, hub, push):
    assert push("runs/first", "--repo", "other", "--revision", "try")[0] == 0
    assert "model.safetensors" in hub.files("me/other", "try")
    assert "# me/other" in hub.files("me/other", "try")["README.md"].decode()
    assert push("runs/first", "--dry_run")[1].startswith("To other, branch try")


def test_without_anything_said_the_folder_names_the_repository(folder, hub, push):
    (folder / "recipe.yaml").unlink()
    assert push("runs/first")[0] == 0
    assert "last-checkpoint/model.safetensors" not in hub.files("me/first")


def test_a_checkpoint_goes_where_its_run_goes(folder, hub, push):
    assert push("runs/first/checkpoint-2")[0] == 0
    assert hub.files("me/wanted")["model.safetensors"] == b"older"


def test_after_a_failure_the_same_command_sends_the_rest(folder, hub, push):
    hub.fail("commit", for_ever=500)
    status, _, err = push("runs/first")
    assert status == 2
    assert err.endswith("error: me/wanted: the Hub answered 500: a fault. The same command sends the rest.\n")
    assert len(hub.stored) == 2
    hub.faults.clear()
    assert push("runs/first")[0] == 0
    assert len(hub.stored) == 2
    assert len(hub.files("me/wanted")) == 6


MISTAKES = {
    "no folder": (("nowhere",), "nowhere: there is no such folder"),
    "no model": (("runs",), "runs: holds no model"),
    "not a name": (("runs/first", "--repo", "a/b/c"), "HFValidationError: Repo id must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_a_line(folder, hub, push, mistake):
    arguments, message = MISTAKES[mistake]
    status, _, err = push(*arguments)
    assert (status, "Traceback" in err) == (2, False)
    assert message in err
    assert hub.stored == []


def test_a_file_with_a_token_stops_a_dry_run_too(folder, hub, push):
    (folder / "config.json").write_text(json.dumps({"note": TOKEN}))
    status, out, err = push("runs/first", "--dry_run")
    assert status == 2
    assert "config.json holds an access token" in err
    assert TOKEN not in out + err
    assert hub.requests == []
