"""A model card: complete, readable by the Hub, and without anything of the machine it was written on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from prefopt.report.card import loss_names, model_card, publishable, write_card
from prefopt.report.plots import save_plots
from prefopt.report.results import write_results

CANARY = "hf_" + "c" * 34
RECIPE = {
    "model_name_or_path": "some-org/Some-Model-0.5B",
    "dataset_name": "some-org/pairs",
    "loss": {"name": "tdpo2", "beta": 0.1, "alpha": 0.5},
    "learning_rate": 5e-6,
    "output_dir": "runs/tdpo2",
    "eos_token": "</s>",
}
RESULTS = {
    "train": {"loss": 0.41234567, "rewards/margins": 1.5, "epoch": 1.0, "learning_rate": 0.0},
    "eval": {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_runtime": 3.2, "eval_samples_per_second": 9.0},
    "data": {"train": {"kept": 97, "dropped": {"identical answers": 3, "too_long": {"count": 2, "first": []}}}},
    "versions": {"torch": "2.13.0", "prefopt": "0.1.0"},
    "devices": ["Some GPU", "Some GPU"],
}
DOCS = {"tdpo2": "Token-level DPO with a stop-gradient.\n\narXiv 2404.11999, eq. 17. More words."}


def test_the_header_is_what_the_hub_reads():
    data = ModelCard(model_card(RECIPE, RESULTS, license="apache-2.0", loss_docs=DOCS)).data
    assert data.base_model == "some-org/Some-Model-0.5B"
    assert data.datasets == ["some-org/pairs"]
    assert data.tags == ["prefopt", "tdpo2"]
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"data_files": "pairs.jsonl"}, "`pairs.jsonl`"),
        ({"data_files": {"train": ["a.jsonl", "b.jsonl"], "test": "held.jsonl"}}, "`a.jsonl`, `b.jsonl`"),
        ({"datasets": [{"path": "org/set"}, {"data_files": "mine.jsonl", "fraction": 0.5}]}, "`org/set`, `mine.jsonl`"),
    ],
)
def test_the_first_sentence_names_start_and_training_data(data, shown):
    text = model_card({"loss": {"name": "dpo"}, **data}, {})
    assert f"This model was trained from scratch on the preferences in {shown}, with the loss `dpo`" in text


def test_an_adapter_says_so():
    assert ModelCard(model_card(RECIPE, RESULTS, adapter=True)).data.library_name == "peft"


def test_the_body_holds_results_data_versions_and_paper():
    text = model_card(RECIPE, RESULTS, loss_docs=DOCS, title="some-org/tdpo2")
    for line in (
        "| `loss` | 0.4123 | 0.5 |",
        "| `rewards/accuracies` |  | 0.75 |",
        "| train | 97 | 3 (identical answers), 2 (too long) |",
        "- `tdpo2`: Token-level DPO with a stop-gradient.",
        "- `tdpo2`: [arXiv 2404.11999](https://arxiv.org/abs/2404.11999)",
        "- torch 2.13.0",
        'generate = pipeline("text-generation", model="some-org/tdpo2")',
    ):
        assert line in text.splitlines()
    assert "runtime" not in text
    assert "per_second" not in text
    assert text.count("Some GPU") == 1


def test_a_reference_that_moved_is_told():
    moved = model_card({**RECIPE, "reference": {"source": "auto", "sync_steps": 512}}, RESULTS)
    assert "The reference followed the policy, moving: every 512 steps, alpha 0.6 (TR-DPO, arXiv 2404.09656)." in moved
    assert "TR-DPO" not in model_card({**RECIPE, "reference": {"source": "auto"}}, RESULTS)


def test_the_recipe_can_be_copied_out_of_the_card():
    text = model_card(RECIPE, RESULTS)
    block = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(block) == RECIPE


def test_the_command_names_the_plugins_and_where_the_rows_are():
    command = "`prefopt train recipe.yaml{}` makes this model again, from the same data."
    assert command.format("") in model_card(RECIPE, {}, recipe_file=True).splitlines()
    recipe = {"data_files": {"train": ["/srv/a.jsonl"], "test": "b.jsonl"}, "loss": {"name": "mine"}}
    mixed = {"datasets": [{"path": "org/set"}, {"data_files": ["b.jsonl", "hf://datasets/org/c.jsonl"]}]}
    text = model_card(recipe, {}, recipe_file=True, plugins=["mine.py"])
    assert command.format(" --plugin plugins/mine.py") in text.splitlines()
    assert "Run it in the folder that has `a.jsonl`, with the path of the recipe." in text
    assert "Run it in the folder that has `b.jsonl`," in model_card(
        {**recipe, "data_files": None} | mixed, {}, recipe_file=True
    )
    for absent in (model_card(RECIPE, {}, recipe_file=True), model_card(recipe, {}, plugins=["mine.py"])):
        assert "Run it in" not in absent and "--plugin" not in absent


def test_no_secret_and_no_path_of_the_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = {
        **RECIPE,
        "model_name_or_path": "/home/somebody/models/base",
        "data_files": ["/srv/private/pairs.jsonl", "~/more.jsonl", r"C:\\Users\\me\\rows.jsonl"],
        "note": "kept in /home/somebody/notes",
        "hub_token": CANARY,
        "env": {"HF_TOKEN": CANARY},
        "plugin": f"see x{CANARY}",
    }
    text = model_card(
        recipe, {**RESULTS, "token": CANARY}, title="/home/somebody/runs/a", base_model=recipe["model_name_or_path"]
    )
    for private in ("somebody", "/srv/private", "Users", CANARY, "hub_token"):
        assert private not in text
    assert "pairs.jsonl" in text
    assert "more.jsonl" in text
    assert "rows.jsonl" in text


def test_a_local_model_is_named_in_the_text_but_not_in_the_header(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/sft").mkdir(parents=True)
    text = model_card({**RECIPE, "model_name_or_path": "runs/sft", "dataset_name": None}, RESULTS)
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.datasets is None
    assert "`runs/sft`" in text


def test_a_mixture_names_all_its_losses():
    recipe = {**RECIPE, "loss": [{"name": "dpo"}, {"name": "sft"}]}
    assert loss_names(recipe) == ["dpo", "sft"]
    assert ModelCard(model_card(recipe, {})).data.tags == ["prefopt", "dpo", "sft"]


@pytest.mark.parametrize("results", [{}, {"train": {}, "eval": {}, "data": {}}])
def test_sections_without_content_are_left_out(results):
    text = model_card(RECIPE, results)
    for heading in ("## Results", "## Curves", "## Data", "## Versions", "## Citation"):
        assert heading not in text
    assert "\n\n\n" not in text


def test_publishable_keeps_ordinary_values():
    value = {"beta": 0.1, "flag": True, "none": None, "names": ("a", "b"), "relative": "runs/x"}
    assert publishable(value) == {**value, "names": ["a", "b"]}


def test_a_run_folder_gets_its_card(tmp_path):
    metrics = [{"step": step, "loss": 1 / step} for step in range(1, 5)]
    save_plots(tmp_path, metrics)
    write_results(tmp_path, {"train": metrics[-1]})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    path = write_card(tmp_path, RECIPE, loss_docs=DOCS)
    text = path.read_text()
    assert path == tmp_path / "README.md"
    assert "![overview](plots/overview.png)" in text
    assert "[loss](plots/loss.png)" in text
    assert '"role": "user"' in text
    assert str(tmp_path.parent) not in text
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("_")) == []
