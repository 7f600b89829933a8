"""What is sent: the files on the list and no others, without paths of this machine, and never a token."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from prefopt.checkpoints import MANIFEST, problem, seal
from prefopt.errors import UserError
from prefopt.hub.files import (
    checkpoint_files,
    folder_files,
    hold,
    left_behind,
    outdated,
    refuse_secrets,
    remarks,
    run_files,
)

SENT = {
    "README.md": "---\n---\n# run\n",
    "adapter_config.json": json.dumps({"base_model_name_or_path": "some-org/base", "r": 8}),
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}",
    "config.json": "{}",
    "generation_config.json": "{}",
    "merges.txt": "a b",
    "metrics.jsonl": '{"step": 1}\n',
    "model-00001-of-00002.safetensors": "first",
    "model-00002-of-00002.safetensors": "second",
    "model.safetensors.index.json": "{}",
    "modeling_own.py": "class Own: ...",
    "plots/loss.png": "picture",
    "recipe.yaml": "loss:\n  name: dpo\noutput_dir: runs/x\n",
    "results.json": "{}",
    "special_tokens_map.json": "{}",
    "spiece.model": "pieces",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "vocab.json": "{}",
}
KEPT = (
    "_results.json.tmp", "_push-4/0-model.safetensors", "_half.safetensors", ".hidden.safetensors", "training_args.bin",
    "optimizer.pt", "stage.json", "reference.json", "push.json", "store.lock", "notes.txt", "data.jsonl", "secret.env",
    "results.json.tmp", "plots/raw.csv", "wandb/run.json", "start/model.safetensors", "train.py",
)  # fmt: skip


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def make_checkpoint(folder: Path, step: int, **more: str) -> Path:
    files = {"model.safetensors": f"weights {step}", "optimizer.pt": "state", "training_args.bin": "pickle", **more}
    path = fill(folder / f"checkpoint-{step}", files)
    seal(path, step, {"world_size": 1})
    return path


def test_only_what_is_on_the_list_is_sent(tmp_path):
    fill(tmp_path, {**SENT, **dict.fromkeys(KEPT, "no")})
    files = run_files(tmp_path)
    assert sorted(files) == sorted(SENT)
    assert all(files[name] == tmp_path / name for name in SENT), "a file that tells nothing is sent as it is"
    assert remarks(files) == []
    assert left_behind(tmp_path, files) == sorted(
        {f"{name.split('/')[0]}/" if "/" in name else name for name in KEPT} - {"plots/"}
    )


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("private")
    run = fill(tmp_path / "run", {"model.safetensors": "weights"})
    (run / "config.json").symlink_to(tmp_path / "elsewhere")
    (run / "plots").symlink_to(fill(tmp_path / "album", {"me.png": "private"}))
    assert list(run_files(run)) == ["model.safetensors"]


def test_paths_of_this_machine_are_cut_to_their_last_part(tmp_path):
    recipe = {
        "push_to_hub": True,
        "hub_revision": "x",
        "model_name_or_path": "/home/me/base",
        "data_files": ["/srv/pairs.jsonl", "more.jsonl"],
        "beta": 0.1,
    }
    fill(
        tmp_path,
        {
            "model.safetensors": "weights",
            "recipe.yaml": yaml.safe_dump(recipe),
            "results.json": json.dumps({"data": {"file": "/srv/pairs.jsonl"}, "loss": "nan"}),
            "adapter_config.json": json.dumps({"base_model_name_or_path": "/home/me/base", "r": 8}),
            "tokenizer.json": json.dumps({"model": {"merges": ["/ home", "/usr /x"]}}),
        },
    )
    files = run_files(tmp_path)
    assert yaml.safe_load(files["recipe.yaml"]) == {
        "model_name_or_path": "base", "data_files": ["pairs.jsonl", "more.jsonl"], "beta": 0.1,
    }  # fmt: skip
    assert json.loads(files["results.json"]) == {"data": {"file": "pairs.jsonl"}, "loss": "nan"}
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": None, "r": 8}
    assert files["tokenizer.json"] == tmp_path / "tokenizer.json", "pieces of words are not paths"


def test_an_adapter_never_names_a_local_folder_that_could_be_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/start").mkdir(parents=True)
    config = json.dumps({"base_model_name_or_path": "runs/start"})
    files = run_files(fill(tmp_path / "x", {"adapter_model.safetensors": "weights", "adapter_config.json": config}))
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert remarks(files) == [
        "adapter_config.json goes without its base model, a folder of this machine: train from one on the Hub"
    ]


@pytest.mark.parametrize("name", ["README.md", "config.json", "metrics.jsonl", "tokenizer_config.json"])
@pytest.mark.parametrize("secret", ["given", "environment", "anybody's"])
def test_a_text_with_a_token_stops_the_push(tmp_path, monkeypatch, name, secret):
    tokens = {"given": "my-own-token", "environment": "token-of-the-shell", "anybody's": "hf_" + "a1B2" * 9}
    monkeypatch.setenv("HF_TOKEN", tokens["environment"])
    fill(tmp_path, {"model.safetensors": "weights", name: f"x {tokens[secret]} y"})
    with pytest.raises(UserError, match=f"{name} holds an access token, so nothing is sent") as raised:
        refuse_secrets(run_files(tmp_path), tokens["given"])
    assert tokens[secret] not in str(raised.value)


def test_words_that_only_look_like_a_token_are_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")  # too short to be one, and in every text
    refuse_secrets(run_files(fill(tmp_path, {"model.safetensors": "w", "README.md": "hf_hub_url and hf_home, x"})))


# Checkpoints


def test_a_sent_checkpoint_verifies_where_it_arrives(tmp_path):
    path = make_checkpoint(
        tmp_path,
        4,
        **{
            "README.md": "PEFT's, with a path",
            "trainer_state.json": json.dumps({"best_model_checkpoint": "/home/me/runs/x/checkpoint-2", "loss": 0.5}),
        },
    )
    files = checkpoint_files(path, "last-checkpoint")
    names = {name.removeprefix("last-checkpoint/") for name in files}
    assert names == {"model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST}
    for name, content in files.items():
        target = tmp_path / "arrived" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    arrived = tmp_path / "arrived" / "last-checkpoint"
    assert problem(arrived) is None
    assert json.loads((arrived / "trainer_state.json").read_text()) == {
        "best_model_checkpoint": "checkpoint-2", "loss": 0.5,
    }  # fmt: skip
    for name in ("optimizer.pt", "trainer_state.json"):
        content = (arrived / name).read_bytes()
        (arrived / name).write_bytes(content[:-1] + b"x")
        assert problem(arrived) == f"{name} has changed since it was sealed"
        (arrived / name).write_bytes(content)


def test_the_checkpoints_of_a_folder_follow_the_strategy(tmp_path):
    fill(tmp_path, {"model.safetensors": "weights"})
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_text("cut")
    assert list(folder_files(tmp_path, "every_save")) == ["model.safetensors"]
    last = folder_files(tmp_path, "checkpoint")
    assert last["last-checkpoint/model.safetensors"].read_text() == "weights 4"
    every = {name.split("/")[0] for name in folder_files(tmp_path, "all_checkpoints")}
    assert every == {"model.safetensors", "checkpoint-2", "checkpoint-4"}


def test_a_run_without_a_model_yet_sends_that_of_its_newest_whole_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 2)
    (make_checkpoint(tmp_path, 4) / "model.safetensors").write_text("damaged")
    fill(tmp_path, {"metrics.jsonl": "{}\n"})
    files = run_files(tmp_path)
    assert sorted(files) == ["metrics.jsonl", "model.safetensors"]
    assert files["model.safetensors"].read_text() == "weights 2"


def test_a_checkpoint_is_sent_by_its_own_name_only_when_it_is_whole(tmp_path):
    path = make_checkpoint(tmp_path, 4)
    assert list(run_files(path)) == ["model.safetensors"]
    (path / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"not whole: optimizer\.pt is missing"):
        run_files(path)


@pytest.mark.parametrize(("files", "message"), [({}, "holds no model"), ({"config.json": "{}"}, "holds no model")])
def test_a_folder_without_weights_is_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        run_files(fill(tmp_path, files))
    with pytest.raises(UserError, match="no such folder"):
        run_files(tmp_path / "absent")


# Beside what an earlier push left


@pytest.mark.parametrize(
    ("remote", "sent", "old"),
    [
        # Of one file and of shards, `from_pretrained` takes the one file.
        (["model.safetensors"], ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], True),
        (["model-00003-of-00003.safetensors"], ["model.safetensors"], True),
        (["adapter_config.json", "adapter_model.safetensors"], ["model.safetensors"], True),
        (["last-checkpoint/rng_state_1.pth"], ["last-checkpoint/rng_state.pth"], True),
        (["model.safetensors"], ["model.safetensors"], False),
        (["model.safetensors"], ["adapter_model.safetensors"], False),
        (["last-checkpoint/model.safetensors", "checkpoint-2/model.safetensors"], ["model.safetensors"], False),
        (["LICENSE", "onnx/model.onnx", "model_fp8.safetensors", ".gitattributes"], ["model.safetensors"], False),
    ],
)
def test_what_would_be_read_with_a_later_push_is_outdated_and_nothing_else(remote, sent, old):
    assert outdated(remote, sent) == (remote if old else [])


def test_held_files_outlive_the_deletion_of_their_checkpoint(tmp_path, monkeypatch):
    path = make_checkpoint(tmp_path, 4)
    files = {"model.safetensors": path / "model.safetensors", **checkpoint_files(path, "last-checkpoint")}
    held = hold(files, tmp_path / "_push-4")
    assert os.stat(held["model.safetensors"]).st_ino == os.stat(path / "model.safetensors").st_ino, "a copy"
    assert held["model.safetensors"] == held["last-checkpoint/model.safetensors"]
    (path / "model.safetensors").unlink()
    assert held["model.safetensors"].read_text() == "weights 4"

    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    held = hold({"optimizer.pt": path / "optimizer.pt"}, tmp_path / "_push-4")
    assert held["optimizer.pt"].read_text() == "state"
    assert len(list((tmp_path / "_push-4").iterdir())) == 1
