"""What runs leave on the Hub: trees, cards, and nothing about the machine they ran on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM

from prefopt.checkpoints import problem
from prefopt.hub.files import hold
from prefopt.hub.pushes import read_record
from prefopt.models import load_model
from tests.helpers import text_pairs
from tests.hub.runs import (
    ADAPTER,
    LORA,
    MODEL,
    PUSH,
    REPORT,
    SO_FAR,
    STATE,
    TOKENIZER,
    train,
    train_in_python,
    within,
)


def test_a_run_from_a_recipe_leaves_its_model_and_report(here, hub, tmp_path, capsys):
    folder = train(*PUSH)
    files = hub.files("me/first")
    assert sorted(files) == sorted(MODEL + TOKENIZER + REPORT)
    for name in set(files) - {"README.md", "recipe.yaml"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert hub.commits("me/first")[-1] == "End of training"
    said = capsys.readouterr().out
    assert "push: the model is on the Hub: 10 files" in said
    last = read_record(folder)["pushes"][-1]
    assert last["oid"] == hub.repositories["me/first"].branches["main"][-1][0]
    assert sorted(last["files"]) == sorted(files)
    copy = snapshot_download("me/first", local_dir=tmp_path / "copy", endpoint=hub.url)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, copy))
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_report_that_comes_after_the_training_is_sent_as_well(here, hub):
    """The last stage of rounds that trains has pushed before it."""
    block = "{name: spin, rounds: 1, max_new_tokens: 4, beta: 1.0}"
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in text_pairs(12)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train(*PUSH, "--data_files", "answers.jsonl", "--loss", "{name: dpo}", "--procedure", block)
    files = hub.files("me/first")
    assert b"## Rounds" in files["README.md"]
    assert files["results.json"] == (folder / "results.json").read_bytes()
    assert hub.commits("me/first")[-1] == "Report of all stages"


def test_an_adapter_is_pushed_as_an_adapter(here, hub, tmp_path):
    folder = train(*PUSH, *LORA)
    files = hub.files("me/first")
    assert sorted(files) == sorted(ADAPTER + TOKENIZER + REPORT)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert 'from_pretrained("path/to/tiny")' in card.text
    # Nobody else has the folder `tiny`; who has it says so, and gets the same model.
    copy = Path(snapshot_download("me/first", local_dir=tmp_path / "copy", endpoint=hub.url))
    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    ours, theirs = load_model(str(folder)).eval(), load_model(str(copy)).eval()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("strategy", "names"), [("checkpoint", ["last-checkpoint"]), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])]
)
def test_a_strategy_leaves_its_checkpoints_and_they_verify(tmp_path, hub, strategy, names):
    trainer = train_in_python(tmp_path / "first", push_to_hub=True, hub_strategy=strategy)
    trainer.push_to_hub()
    extra = [file for name in names for file in within(name, MODEL + TOKENIZER + STATE)]
    assert sorted(hub.files("me/first")) == sorted([*MODEL, *TOKENIZER, "README.md", "results.json", *extra])
    copy = Path(snapshot_download("me/first", local_dir=tmp_path / "copy", endpoint=hub.url))
    assert {name: problem(copy / name) for name in names} == dict.fromkeys(names)


@pytest.mark.slow
def test_a_run_can_go_on_from_the_checkpoint_on_the_hub(here, hub, tmp_path):
    whole = train(*PUSH, "--hub_strategy", "checkpoint")
    copy = Path(snapshot_download("me/first", local_dir=tmp_path / "copy", endpoint=hub.url)) / "last-checkpoint"
    longer = ("--max_steps", "5", "--allow_change", "[max_steps]")
    again = train("--output_dir", "runs/again", "--resume", str(copy), *longer)
    assert json.loads((again / "results.json").read_text())["steps"] == 5
    assert (whole / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_while_training_the_model_goes_with_a_card_that_says_so(tmp_path, hub):
    trainer = train_in_python(tmp_path / "first", push_to_hub=True, hub_always_push=True)
    assert hub.commits("me/first") == ["Training in progress, step 1", "Training in progress, step 2"]
    files = hub.files("me/first")
    assert sorted(files) == sorted([*MODEL, *TOKENIZER, "README.md"])
    assert "**Training goes on**: this is the model after step 2 of 2." in files["README.md"].decode()
    assert files["model.safetensors"] == (tmp_path / "first/checkpoint-2/model.safetensors").read_bytes()
    assert trainer.push_to_hub(commit_message="Done").files.keys() == {*MODEL, *TOKENIZER, "README.md", "results.json"}
    card = hub.files("me/first")["README.md"].decode()
    assert "Training goes on" not in card
    assert "name: dpo\n  beta: 0.1" in card
    assert hub.commits("me/first")[-1] == "Done"


def test_so_far_a_recipe_run_sends_its_recipe_and_metrics_too(here, hub, monkeypatch):
    monkeypatch.setattr("prefopt.hub.trainer.HubTrainer.push_run", lambda self: None)
    train(*PUSH, "--hub_always_push", "true")
    assert sorted(hub.files("me/first")) == sorted(MODEL + TOKENIZER + SO_FAR)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_only_sealed_checkpoints_are_pushed(tmp_path, hub, monkeypatch, strategy):
    seen = []

    def look(files, folder):
        seen.append(problem(folder.with_name(folder.name.replace("_push", "checkpoint"))))
        return hold(files, folder)

    monkeypatch.setattr("prefopt.hub.trainer.hold", look)
    train_in_python(tmp_path / "first", push_to_hub=True, hub_strategy=strategy)
    assert seen == [None, None]


def test_pushing_by_hand_needs_no_setting(tmp_path, hub):
    trainer = train_in_python(tmp_path / "first", save_strategy="no")
    assert hub.requests == []
    sent = trainer.push_to_hub(private=True, revision="try", license="mit")
    assert hub.repositories["me/first"].private
    assert sorted(hub.files("me/first", "try")) == sorted(sent.files)
    assert ModelCard(hub.files("me/first", "try")["README.md"].decode()).data.license == "mit"
    later = trainer.push_to_hub(blocking=False)
    assert later.result().repo == "me/first"


def test_a_supervised_start_is_not_pushed(here, hub, capsys):
    train(*PUSH, "--hub_strategy", "end", "--procedure.start.max_steps", "2")
    assert hub.commits("me/first") == ["End of training"]
    assert capsys.readouterr().out.count("push: the run goes to") == 1
    assert "push_to_hub: false" in Path("runs/first/start/recipe.yaml").read_text()


def test_a_finished_run_is_not_another_one_for_being_pushed(here, hub, capsys):
    train()
    train(*PUSH)
    assert "done before" in capsys.readouterr().out


# The card and the figures


def test_the_card_has_recipe_fingerprint_results_and_the_command(here, hub):
    folder = train(*PUSH)
    card = hub.files("me/first")["README.md"].decode()
    results = json.loads((folder / "results.json").read_text())
    assert len(results["fingerprint"]["train"]) == 64
    for line in (
        "# me/first",
        f"| train | 10 | none | `{results['fingerprint']['train'][:16]}` |",
        "`prefopt train recipe.yaml` makes this model again, from the same data.",
        'generate = pipeline("text-generation", model="me/first")',
    ):
        assert line in card.splitlines()
    assert yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])["loss"] == {"name": "dpo", "beta": 0.2}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    sent = yaml.safe_load(hub.files("me/first")["recipe.yaml"])
    assert recipe == {**sent, "push_to_hub": True, "hub_model_id": "me/first"}, "others do not push there"
    assert "hub_model_id" not in card


def test_nothing_that_is_sent_tells_where_it_was_made(here, hub):
    absolute = ("--model_name_or_path", str(here / "tiny"), "--data_files", str(here / "pairs.jsonl"))
    best = ("--load_best_model_at_end", "true", "--eval_steps", "1")
    folder = here / "runs" / "absolute"
    train(*PUSH, *LORA, *absolute, *best, "--output_dir", str(folder), "--hub_strategy", "all_checkpoints")
    assert str(here) in (folder / "recipe.yaml").read_text(), "on this machine the recipe works as it stands"
    for name, content in hub.files("me/first").items():
        assert str(here.parent).encode() not in content, name
        assert b"/home/" not in content, name
