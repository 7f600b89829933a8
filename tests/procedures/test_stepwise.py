"""Stepwise DPO: every step starts from, and is compared with, what the step before left."""

from __future__ import annotations

import json
import math
import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from prefopt import cli
from prefopt.errors import RecipeError, UserError
from prefopt.models import load_model
from prefopt.procedures import MakeStage, TrainStage, make_plan, run_plan
from prefopt.procedures.lineage import LINEAGE, Lineage, lineage_of, read_lineage
from prefopt.recipe import load_recipe
from prefopt.reference.identity import identify
from prefopt.reference.live import AdapterOff
from prefopt.report.results import read_metrics
from tests.helpers import make_model, make_tokenizer, text_pairs

RECIPE = """\
model_name_or_path: tiny
data_files: [one.jsonl, two.jsonl, three.jsonl]
loss: {name: dpo, beta: 0.2}
procedure: {name: stepwise, chunks: datasets}
output_dir: run
learning_rate: 1.0e-3
per_device_train_batch_size: 4
num_train_epochs: 2
save_steps: 2
logging_steps: 2
report_to: none
self_check: false
disable_tqdm: true
"""
LORA = """\
use_peft: true
lora_r: 4
lora_dropout: 0.0
lora_target_modules: all-linear
"""
FILES = ("one.jsonl", "two.jsonl", "three.jsonl")


def prepare(folder: Path, extra: str = "") -> None:
    """A folder with a model, three files of pairs and a recipe."""
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    for seed, file in enumerate(FILES):
        rows = text_pairs(8, seed=seed, source=file)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE + extra)


def finish(tmp_path_factory, extra: str = "") -> Path:
    folder = tmp_path_factory.mktemp("stepwise")
    prepare(folder, extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PREFOPT_STORE", str(folder / "store"))
        patch.setattr("prefopt.procedures.train.save_plots", lambda *args: [])
        assert cli.main(["train", "recipe.yaml"]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of three steps that trains all weights."""
    return finish(tmp_path_factory)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """The same with an adapter."""
    return finish(tmp_path_factory, LORA)


@pytest.fixture(params=["whole", "lora"])
def finished(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A function: a copy of a finished folder, or a fresh one, as the current folder, with plots left out."""

    def enter(source: Path | None = None, extra: str = "") -> Path:
        folder = tmp_path / "copy"
        if source is None:
            folder.mkdir()
            prepare(folder, extra)
        else:
            shutil.copytree(source, folder)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PREFOPT_STORE", str(folder / "store"))
        monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *args: [])
        return folder

    return enter


def steps_of(folder: Path) -> list[Path]:
    return [folder / "run" / "step-1", folder / "run" / "step-2", folder / "run"]


def weights_in(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_reference_that_moves_begins_every_step_with_what_the_step_before_left(here):
    folder = here(extra=LORA + "reference: {sync_steps: 2}\n")
    assert cli.main(["train", "recipe.yaml"]) == 0
    left = [read_lineage(step)["left"]["weights"] for step in steps_of(folder)]
    records = [json.loads((step / "reference.json").read_text()) for step in steps_of(folder)]
    assert [record["weights"] for record in records[1:]] == left[:-1]
    assert all(record["moves"] == {"sync_steps": 2, "mixup_alpha": 0.6} for record in records)


def train(*overrides: str) -> int:
    return cli.main(["train", "recipe.yaml", *overrides])


# ---- the plan -------------------------------------------------------------------------------------------------------


def plan(tmp_path: Path, *overrides: str) -> list[Any]:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return list(make_plan(load_recipe(tmp_path / "recipe.yaml", overrides)))


def test_the_plan_is_known_before_anything_is_read(tmp_path):
    """Neither the model nor the data of this recipe exist."""
    chunks, one, two, three, report = plan(tmp_path)
    assert [stage.name for stage in (chunks, one, two, three, report)] == [
        "chunks", "step-1", "step-2", "step-3", "report",
    ]  # fmt: skip
    assert [str(stage.folder) for stage in (one, two, three)] == ["run/step-1", "run/step-2", "run"]
    starts = [stage.recipe.model.model_name_or_path for stage in (one, two, three)]
    assert starts == ["tiny", "run/step-1", "run/step-2"]
    assert [stage.recipe.data.data_files for stage in (one, two, three)] == [
        f"run/chunks/chunk-{step}.jsonl" for step in (1, 2, 3)
    ]
    assert not any(stage.recipe.data.datasets or stage.recipe.procedure for stage in (one, two, three))


def test_values_for_each_step_and_the_last_one_goes_on(tmp_path):
    lists = {"name": "stepwise", "chunks": 3, "beta": [0.1, 0.3], "learning_rate": [1e-3, 1e-4, 1e-5]}
    steps = [
        stage.recipe for stage in plan(tmp_path, "--procedure", json.dumps(lists)) if isinstance(stage, TrainStage)
    ]
    assert [step.loss[0].knobs["beta"] for step in steps] == [0.1, 0.3, 0.3]
    assert [step.training["learning_rate"] for step in steps] == [1e-3, 1e-4, 1e-5]
    assert {step.training["num_train_epochs"] for step in steps} == {2}


def test_only_the_last_step_is_pushed_and_goes_on_from_a_checkpoint_that_is_named(tmp_path):
    stages = plan(tmp_path, "--resume", "elsewhere", "--push_to_hub", "--hub_model_id", "me/x")
    steps = [stage.recipe.training for stage in stages if isinstance(stage, TrainStage)]
    assert [step["resume"] for step in steps] == ["auto", "auto", "elsewhere"]
    assert [step["push_to_hub"] for step in steps] == [False, False, True]


def test_every_step_is_evaluated_on_the_same_rows(tmp_path):
    steps = [stage for stage in plan(tmp_path, "--test_split_size", "4") if isinstance(stage, TrainStage)]
    assert {stage.recipe.data.data_files["test"] for stage in steps} == {"run/chunks/test.jsonl"}


def test_the_small_world_and_a_supervised_start_come_first(tmp_path):
    scratch = ("--model_name_or_path", "null", "--from_scratch", "{model_type: llama, vocab_size: 512}")
    block = "{name: stepwise, chunks: 2, world: {texts: 50}, start: {num_train_epochs: 1}}"
    names = [stage.name for stage in plan(tmp_path, *scratch, "--data_files", "null", "--procedure", block)]
    assert names == ["texts", "start", "pairs", "chunks", "step-1", "step-2", "report", "compare"]
    block = "{name: stepwise, chunks: 2, start: {}}"
    start, _, one, *_ = plan(tmp_path, *scratch, "--procedure", block)
    assert one.recipe.model.model_name_or_path == str(start.folder) == "run/start"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--procedure", "{name: stepwise, chunk: 2}"], "Did you mean `chunks`"),
        (["--procedure", "{name: stepwise, chunks: 2, order: easy}"], "`easy` is not one of easy_to_hard"),
        (["--procedure", "{name: stepwise, chunks: 2, length: means}"], "Did you mean `mean`"),
        (["--procedure", "{name: stepwise, chunks: 2, beta: [1, 2, 3]}"], "has 3 values, and there are 2 steps"),
        (["--procedure", "{name: stepwise, chunks: 2, beta: [0]}"], "numbers above 0"),
        (["--loss", "{name: kto}"], "needs a loss over pairs, and kto reads single answers"),
        (["--reference.model", "tiny"], "reference of each step is the model it starts from"),
        (["--data_files", "null", "--procedure.chunks", "2"], "dataset_name: is missing"),
        (["--model_name_or_path", "null", "--from_scratch", "{model_type: llama}"], "Write procedure.start"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        plan(tmp_path, *overrides)


def test_a_loss_without_beta_has_no_list_of_it(tmp_path):
    with pytest.raises(RecipeError, match="slic has no beta"):
        plan(tmp_path, "--loss", "{name: slic}", "--procedure.beta", "[0.1]")


def test_chunks_depend_on_the_data_the_model_and_the_limits_and_on_no_step(here):
    here()

    def facts(*overrides: str) -> dict[str, Any]:
        chunks = make_plan(load_recipe("recipe.yaml", overrides))[0]
        assert isinstance(chunks, MakeStage)
        return {**chunks.settings, **chunks.inputs()}

    before = facts()
    assert facts("--learning_rate", "1", "--loss.beta", "1", "--num_train_epochs", "9") == before
    for other in (
        ["--max_length", "9"],
        ["--procedure.order", "given"],
        ["--seed", "3"],
        ["--procedure.length", "mean"],
    ):
        assert facts(*other) != before
    Path("two.jsonl").write_text(Path("two.jsonl").read_text() + "\n")
    assert facts() != before


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_each_step_begins_with_the_loss_of_zero_margin(finished):
    """Restarted from the first model, or compared with it, the second and third would not."""
    for run in steps_of(finished):
        first, *_ = read_metrics(run / "metrics.jsonl")
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        *_, last = [event["loss"] for event in read_metrics(run / "metrics.jsonl") if "loss" in event]
        assert last < math.log(2) - 0.01


def test_the_chunks_partition_the_data(finished):
    given = [line for file in FILES for line in (finished / file).read_text().splitlines()]
    written = [(finished / "run/chunks" / f"chunk-{step}.jsonl").read_text().splitlines() for step in (1, 2, 3)]
    assert sorted(map(json.loads, chain.from_iterable(written)), key=str) == sorted(map(json.loads, given), key=str)
    for chunk in written:
        assert len({json.loads(line)["source"] for line in chunk}) == 1
    accuracies = [entry["measured"]["accuracy"] for entry in chunks_of(finished)]
    assert accuracies == sorted(accuracies, reverse=True)


def chunks_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "run/chunks/chunks.json").read_text())["chunks"])


def test_the_reference_of_each_step_is_the_model_that_the_step_before_left(finished, monkeypatch):
    monkeypatch.chdir(finished)
    before = identify(load_model("tiny"))
    for run in steps_of(Path()):
        lineage, reference = read_lineage(run), json.loads((run / "reference.json").read_text())
        assert lineage["reference"]["weights"] == reference["weights"] == before.weights
        assert lineage["start"]["key"] == reference["key"] == before.key
        before = identify(load_model(str(run)))
        assert lineage["left"]["weights"] == before.weights != lineage["start"]["weights"]


def test_scores_of_one_step_s_reference_are_not_used_in_the_next(finished):
    """Each function has an entry of its own in the store, and each step scored all of its answers."""
    keys = {json.loads((run / "reference.json").read_text())["key"] for run in steps_of(finished)}
    assert len(keys) == 3
    for run in steps_of(finished):
        said = json.loads((run / "results.json").read_text())["reference"]
        assert "of 16 answers 0 found in the store, 16 scored" in said


def test_an_adapter_goes_on_being_trained(lora):
    """Switched off, the reference of the second step would be the first model again."""
    one, two, last = (weights_in(run) for run in steps_of(lora))
    assert one.keys() == two.keys() == last.keys() and not same(one, two) and not same(two, last)
    for run in steps_of(lora):
        assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_what_each_step_s_start_model_made_of_its_chunk_is_kept(finished):
    results = json.loads((finished / "run/results.json").read_text())["stepwise"]
    assert [entry["chunk"] for entry in results] == [chunk["name"] for chunk in chunks_of(finished)]
    first, second, third = (entry["before"] for entry in results)
    assert first == chunks_of(finished)[0]["measured"]
    for before, chunk in zip((second, third), chunks_of(finished)[1:], strict=True):
        assert before["pairs"] == 8
        assert before["gap"] != chunk["measured"]["gap"]  # that of the first model
    card = (finished / "run/README.md").read_text()
    assert "| 3    | " in card and "accuracy before" in card and "chunks: datasets" in card
    assert (finished / "run/plots/steps.png").is_file()


def test_the_recipe_in_the_run_folder_makes_the_whole_run_again(finished, monkeypatch):
    monkeypatch.chdir(finished)
    assert load_recipe("run/recipe.yaml") == load_recipe("recipe.yaml")


def test_one_chunk_is_the_plain_run_bit_for_bit(here):
    folder = here()
    assert train("--procedure.chunks", "1") == 0
    assert train("--procedure", "{name: single}", "--output_dir", "plain") == 0
    assert same(weights_in(folder / "run"), weights_in(folder / "plain"))
    results = [json.loads((folder / run / "results.json").read_text()) for run in ("run", "plain")]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]


@pytest.mark.parametrize("loss", ["ipo", "simpo"])
def test_any_loss_over_pairs(here, loss):
    """Also one that reads no reference: the chain then holds for the start alone."""
    here()
    assert train("--loss", f"{{name: {loss}}}", "--procedure.chunks", "2") == 0
    record = read_lineage(Path("run"))
    assert record["start"]["weights"] == read_lineage(Path("run/step-1"))["left"]["weights"]
    assert (record["reference"] is None) == (loss == "simpo")


def test_flat_weights_are_refused_before_the_first_step(tmp_path):
    """FSDP 1 wraps the model when training begins, and what a stage left could not be identified at its end."""
    plugin = SimpleNamespace(fsdp_version=1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    with pytest.raises(UserError, match="set `fsdp_version: 2`"):
        Lineage(tmp_path, None, fresh_adapter=False, from_start=True).begin(trainer)


# ---- stopping and going on ------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the process, as far as a test may, after so many optimizer steps of all stages."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("extra", ["", LORA], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "steps",
    [7, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 3, 4, 5, 8, 11, 12))],
    ids=lambda steps: f"step {steps} of 12",
)
def test_a_run_that_is_killed_and_started_again_ends_with_the_same_bits(here, request, monkeypatch, extra, steps):
    """Each step of the plan has four optimizer steps, saved every second."""
    finished = request.getfixturevalue("lora" if extra else "whole")
    folder, kill = here(extra=extra), KillAt(steps)
    from prefopt.procedures import train as module

    stock = module.show_progress
    monkeypatch.setattr(module, "show_progress", lambda trainer: (stock(trainer), trainer.add_callback(kill)))
    with pytest.raises(Killed):
        train()
    monkeypatch.setattr(module, "show_progress", stock)
    assert train() == 0
    for now, then in zip(steps_of(folder), steps_of(finished), strict=True):
        assert same(weights_in(now), weights_in(then))
        assert read_lineage(now)["left"]["weights"] == read_lineage(then)["left"]["weights"]


def test_stages_run_one_by_one_end_with_the_same_bits(here, whole):
    folder = here()
    for stage in ("1", "step-1", "3"):
        assert train("--stage", stage) == 0
    assert not (folder / "run/model.safetensors").exists()
    assert train() == 0
    assert same(weights_in(folder / "run"), weights_in(whole / "run"))


def test_a_stage_whose_forerunner_is_not_done_is_refused(here, capsys):
    here()
    assert train("--stage", "chunks") == 0
    assert train("--stage", "step-2") == 2
    said = capsys.readouterr().err
    assert "`step-2` goes on from `step-1`, stage 2, which is not done: run/step-1. Run --stage 2 first" in said
    assert train("--stage", "step-4") == 2
    assert "no stage `step-4`. Did you mean `step-3`? It has: 1 chunks, 2 step-1" in capsys.readouterr().err


# ---- the proof ------------------------------------------------------------------------------------------------------


def restart_last(folder: Path) -> None:
    """Make the last step one that has not begun."""
    for path in (folder / "run").iterdir():
        if path.name not in ("step-1", "step-2", "chunks"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file({name: value + 1e-6 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def edit_record(folder: Path, **changes: Any) -> None:
    path = folder / LINEAGE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_that_was_edited_between_two_steps_is_refused(here, finished, capsys):
    folder = here(finished)
    restart_last(folder)
    edit_weights(folder / "run" / "step-2")
    assert train() == 2
    assert "run/step-2: not the model that its stage left: " in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["edited", "missing", "unfinished"])
def test_a_record_that_proves_nothing_is_refused(here, whole, capsys, damage):
    folder = here(whole)
    restart_last(folder)
    if damage == "edited":
        edit_record(folder / "run" / "step-2", left=read_lineage(folder / "run" / "step-1")["left"])
    elif damage == "missing":
        (folder / "run" / "step-2" / LINEAGE).unlink()
    else:
        shutil.copy(folder / "run" / "step-1" / LINEAGE, folder / "run" / "step-2" / LINEAGE)
    assert train() == 2
    said = capsys.readouterr().err
    assert ("not the model that its stage left" if damage == "unfinished" else "missing, damaged or edited") in said


def test_the_wrong_reference_is_refused_before_the_first_step(here, lora, monkeypatch, capsys):
    """An adapter that is switched off is the reference of the first step, and of no other."""
    folder = here(lora)
    restart_last(folder)
    monkeypatch.setattr("prefopt.referencing.plan_reference", lambda *args, **kwargs: AdapterOff(None))
    assert train() == 2
    assert (
        "the reference is not the model that this stage starts from, which run/step-2 left" in capsys.readouterr().err
    )


def test_other_settings_of_the_adapter_are_refused(here, lora, capsys):
    folder = here(lora)
    restart_last(folder)
    config = folder / "run/step-2/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    assert train() == 2  # the files first
    assert "adapter_config.json changed since" in capsys.readouterr().err
    assert train("--procedure", "{}", "--model_name_or_path", "run/step-1", "--lora_r", "8", "--output_dir", "x") == 2
    assert "lora_r: 8, but the adapter in `run/step-1`, which goes on being trained, has 4" in capsys.readouterr().err


def test_running_a_finished_plan_again_does_nothing(here, whole, capsys):
    here(whole)
    assert run_plan(make_plan(load_recipe("recipe.yaml"))) is None
    assert capsys.readouterr().out.count("done before") == 5


def test_a_second_stream_of_targets_goes_with_every_step(tmp_path):
    text = RECIPE.replace("{name: dpo, beta: 0.2}", "{name: slic}") + "targets: [{data_files: answers.jsonl}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    steps = [stage for stage in make_plan(load_recipe(tmp_path / "recipe.yaml")) if isinstance(stage, TrainStage)]
    assert len(steps) == 3
    assert all(step.recipe.data.targets[0].data_files == "answers.jsonl" for step in steps)


@pytest.mark.parametrize("written", ["./run", "run/", "run/../run"])
def test_the_proof_holds_however_the_folder_is_written(tmp_path, written):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("output_dir: run", f"output_dir: {written}"))
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"))
    steps = [stage for stage in plan if isinstance(stage, TrainStage)]
    parents = [lineage_of(step, plan).parent for step in steps]
    assert parents == [None, *(step.folder for step in steps[:-1])]
