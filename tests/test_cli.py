"""The command line from end to end on a tiny model: what it prints, what a run leaves behind, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from prefopt import cli
from prefopt.losses import get, names
from prefopt.losses.registry import forget
from tests.helpers import make_model, make_tokenizer, text_pairs

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "add_your_own_loss.py"

RECIPE = """\
model_name_or_path: tiny
data_files: pairs.jsonl
test_split_size: 2
loss:
  name: dpo
  beta: 0.2
learning_rate: 1.0e-3
num_train_epochs: 2
per_device_train_batch_size: 4
logging_steps: 1
eval_strategy: epoch
output_dir: runs/first
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: a model, twelve pairs, a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(12)))
    (folder / "my.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    """The folder of one finished run, started as `accelerate launch` would start it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "my.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    return folder / "runs" / "first"


@pytest.fixture
def prefopt(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in the folder; exit status, output, error output."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(list(arguments))
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def without_plugins() -> Iterator[None]:
    """Take back the losses that a test's plugins register."""
    yield
    for module in [name for name in sys.modules if name.startswith("prefopt_plugin_")]:
        forget(module)
        del sys.modules[module]


# What it tells


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_the_help_says_what_a_plugin_may_hold(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "a loss, a judge or an environment" in " ".join(capsys.readouterr().out.split())


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from prefopt import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'yaml', 'prefopt.losses'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for command in ("train", "explain", "recipe", "losses", "evaluate"):
        assert f"\n    {command} " in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("arguments", [["recipe", "dpo"], ["losses"]])
def test_a_reader_may_leave_early(arguments):
    """As in `prefopt recipe dpo | head -4`."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from prefopt import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_losses_lists_every_loss_with_its_line(prefopt):
    status, out, _ = prefopt("losses")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == names()
    assert "Raises the chosen answer against the rejected one" in out


def test_the_page_of_a_loss(prefopt):
    status, out, _ = prefopt("losses", "dpo")
    assert status == 0
    for part in ("arXiv 2305.18290", "Formula", "Derivation", "beta: default 0.1", "optional columns: preference"):
        assert part in out


def test_recipes_are_listed_and_printed_as_they_are(prefopt):
    listed = prefopt("recipe")[1].split()
    assert {"dpo", "sft"} <= set(listed)
    for name in listed:
        assert prefopt("recipe", name)[:2] == (0, (ROOT / "configs" / f"{name}.yaml").read_text())


def test_a_copied_recipe_explains_like_the_original(prefopt, folder):
    changes = ("--dataset_name", "null", "--data_files", "pairs.jsonl", "--model_name_or_path", "tiny")
    (folder / "copy.yaml").write_text(prefopt("recipe", "sft")[1])
    status, out, _ = prefopt("explain", "copy.yaml", *changes, "--output_dir", "runs/sft")
    assert status == 0
    original = prefopt("explain", "sft", *changes)[1]
    assert out.splitlines()[2:] == original.splitlines()[2:]


def test_explain_tells_steps_reference_and_memory(prefopt):
    status, out, _ = prefopt("explain", "my.yaml", "--loss.beta", "0.3")
    assert status == 0
    for part in ("beta: 0.3", "10 to train on, 2 to evaluate on", "3 an epoch, 6 in", "Each answer is scored once"):
        assert part in out


# What a run leaves behind


def test_a_run_leaves_everything_its_reader_needs(run_folder):
    found = {path.relative_to(run_folder).as_posix() for path in run_folder.rglob("*") if path.is_file()}
    wanted = {
        "config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "metrics.jsonl", "results.json",
        "README.md", "stage.json", "plots/overview.png", "plots/loss.png", "checkpoint-6/trainer_state.json",
    }  # fmt: skip
    assert wanted <= found
    assert not [name for name in found if name.startswith("_")], "temporary files are gone"


def test_its_files_agree_with_each_other(run_folder):
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    assert (recipe["loss"], recipe["max_length"]) == ({"name": "dpo", "beta": 0.2}, 1024)
    assert json.loads((run_folder / "stage.json").read_text())["train"]["status"] == "done"
    results = json.loads((run_folder / "results.json").read_text())
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    training = [event for event in events if "rewards/margins" in event]
    assert [event["step"] for event in training] == [1, 2, 3, 4, 5, 6]
    assert results["steps"] == 6
    assert results["data"]["train"]["kept"] == 10
    assert results["train"]["rewards/margins"] == training[-1]["rewards/margins"] > 0
    assert results["eval"]["eval_loss"] == [event["eval_loss"] for event in events if "eval_loss" in event][-1]
    assert "## Results" in (run_folder / "README.md").read_text()


def test_the_evaluation_is_that_of_the_best_model_where_it_is_kept(prefopt, folder):
    """The second epoch does these two rows no good."""
    options = ("--load_best_model_at_end", "true", "--save_strategy", "epoch", "--output_dir", "runs/best")
    assert prefopt("train", "my.yaml", *options)[0] == 0
    results = json.loads((folder / "runs/best/results.json").read_text())
    events = [json.loads(line) for line in (folder / "runs/best/metrics.jsonl").read_text().splitlines()]
    logged = [event["eval_rewards/margins"] for event in events if "eval_loss" in event]
    assert len(logged) == 2 and logged[0] > logged[1] + 0.005
    assert results["eval"]["eval_rewards/margins"] == pytest.approx(logged[0], abs=1e-6)


def test_the_opening_lines_say_what_runs(run_folder):
    out = (run_folder.parents[1] / "out.txt").read_text()
    for part in ("launch: 1 process,", "10 of 10 rows kept", "loss: 1 DPO(beta=0.2)", "self-check: scores agree",
                 "reference: cached: the starting policy", "start-up margins: largest |log-ratio| "):  # fmt: skip
        assert part in out


def test_a_finished_run_is_not_repeated(prefopt, run_folder):
    before = (run_folder / "model.safetensors").stat().st_mtime_ns
    status, out, _ = prefopt("train", "my.yaml", "--logging_steps", "5")
    assert (status, (run_folder / "model.safetensors").stat().st_mtime_ns) == (0, before)
    assert "done before, in runs/first" in out


def test_another_recipe_in_the_same_folder_is_refused(prefopt, run_folder):
    status, _, err = prefopt("train", "my.yaml", "--loss.beta", "0.3")
    assert status == 2
    assert err == (
        "error: runs/first: holds a finished run with other settings:\n  loss.beta: 0.2 in the run folder, 0.3 now\n"
        "Choose another output_dir, or delete the folder\n"
    )


def test_a_resolved_recipe_runs_as_the_same_run(prefopt, run_folder):
    status, out, _ = prefopt("train", str(run_folder / "recipe.yaml"))
    assert (status, "done before" in out) == (0, True)


def test_a_run_that_was_refused_can_be_mended_and_started_again(prefopt, folder):
    rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    settings = ("train", "my.yaml", "--data_files", "mended.jsonl", "--output_dir", "runs/mended", "--max_steps", "1")
    (folder / "mended.jsonl").write_text("".join([*rows[:7], '{"prompt": "a", "chosen": "b"}\n', *rows[7:]]))
    status, _, err = prefopt(*settings)
    assert (status, err.splitlines()[0].split(" (")[0]) == (
        2,
        "error: mended.jsonl:8: column `rejected`: the column is missing from pairs; the row has `prompt`, `chosen`",
    )
    (folder / "mended.jsonl").write_text("".join(rows))
    assert prefopt(*settings)[0] == 0
    assert (folder / "runs/mended/results.json").is_file()


def test_another_recipe_never_overwrites_a_run_that_has_a_checkpoint(prefopt, folder, run_folder):
    shutil.copytree(run_folder, folder / "runs" / "cut_off")
    mark = folder / "runs" / "cut_off" / "stage.json"
    mark.write_text(mark.read_text().replace("done", "started"))
    status, _, err = prefopt("train", "my.yaml", "--output_dir", "runs/cut_off", "--loss.beta", "0.3")
    assert status == 2
    assert "runs/cut_off: not the same run:\n  loss.beta: 0.2 in the run folder, 0.3 now\n" in err
    assert err.endswith("or go on all the same with allow_change: [loss.beta]\n")


def test_a_supervised_start_and_a_mixture(prefopt, folder):
    mixture = {"loss": [{"name": "dpo", "beta": 0.2}, {"name": "sft"}], "loss_weights": [1.0, 0.5]}
    stages = {"procedure": {"name": "single", "start": {"num_train_epochs": 1}}, "output_dir": "runs/mixture"}
    (folder / "mixture.yaml").write_text(json.dumps({**yaml.safe_load(RECIPE), **mixture, **stages}))
    status, out, _ = prefopt("train", "mixture.yaml")
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        "[1/2] start: runs/mixture/start", "[2/2] train: runs/mixture",
    ]  # fmt: skip
    assert "loss: 1 DPO(beta=0.2) + 0.5 SFT()" in out
    last = json.loads((folder / "runs/mixture/results.json").read_text())["train"]
    assert last["loss"] == pytest.approx(last["loss/dpo"] + 0.5 * last["loss/sft"], rel=1e-5)
    status, out, _ = prefopt("train", "mixture.yaml")
    assert (status, out.count("done before")) == (0, 2)


# Evaluation


def test_evaluate_with_a_reference_and_a_file(prefopt, run_folder):
    command = ("evaluate", "runs/first", "--data", "pairs.jsonl", "--reference", "tiny", "--json", "figures.json")
    status, out, _ = prefopt(*command)
    assert status == 0
    figures = json.loads(Path("figures.json").read_text())
    assert (figures["rows"], figures["metrics"]["reward_margin"]["count"]) == (12, 12)
    assert figures["metrics"]["reward_margin"]["value"] > 0
    assert "reward_accuracy" in out


def test_evaluate_without_a_reference_has_no_rewards(prefopt, run_folder):
    status, out, _ = prefopt("evaluate", "runs/first", "--data", "pairs.jsonl")
    assert (status, "accuracy_per_token" in out, "reward" in out) == (0, True, False)


# Losses from outside


def test_a_plugin_is_a_loss_like_any_other(prefopt, folder, without_plugins):
    status, out, _ = prefopt("losses", "squared_hinge", "--plugin", str(PLUGIN))
    assert (status, out.splitlines()[0]) == (0, "squared_hinge: Squared hinge on DPO's margin")
    options = ("--loss.name", "squared_hinge", "--output_dir", "runs/plugin", "--max_steps", "2")
    assert prefopt("train", "my.yaml", "--plugin", str(PLUGIN), *options)[0] == 0
    recipe = yaml.safe_load((folder / "runs/plugin/recipe.yaml").read_text())
    assert recipe["loss"] == {"name": "squared_hinge", "beta": 0.2}
    assert "rewards/margins" in (folder / "runs/plugin/metrics.jsonl").read_text()


def test_a_run_keeps_the_plugin_it_was_made_with(prefopt, folder, without_plugins):
    """The card's command makes it again where the rows are; the copy is the same formula as the original."""
    options = ("--loss.name", "squared_hinge", "--output_dir", "runs/kept", "--max_steps", "1")
    assert prefopt("train", "my.yaml", "--plugin", str(PLUGIN), *options)[0] == 0
    kept = folder / "runs/kept/plugins" / PLUGIN.name
    assert kept.read_bytes() == PLUGIN.read_bytes()
    command = f"`prefopt train recipe.yaml --plugin plugins/{PLUGIN.name}` makes this model again"
    assert command in (folder / "runs/kept/README.md").read_text()
    forget(get("squared_hinge").__module__)
    again = ("train", "runs/kept/recipe.yaml", "--plugin", str(kept))
    status, out, _ = prefopt(*again)
    assert (status, "done before" in out) == (0, True)
    assert prefopt(*again, "--output_dir", "runs/again")[0] == 0
    first, second = (json.loads((folder / run / "results.json").read_text()) for run in ("runs/kept", "runs/again"))
    assert first["train"]["loss"] == second["train"]["loss"]


def test_a_loss_that_averages_is_refused_before_anything_is_opened(prefopt, folder, without_plugins):
    per_pair = "LossOutput(torch.relu(1 - (a - b)) ** 2,"
    assert per_pair in PLUGIN.read_text()
    text = PLUGIN.read_text().replace(per_pair, "LossOutput((torch.relu(1 - (a - b)) ** 2).mean(),")
    (folder / "averaged.py").write_text(text)
    (folder / "no_model.yaml").write_text(RECIPE.replace("tiny", "not_there"))
    options = ("--plugin", "averaged.py", "--loss.name", "squared_hinge", "--output_dir", "runs/averaged")
    for command in ("train", "explain"):
        status, _, err = prefopt(command, "no_model.yaml", *options)
        assert status == 2
        assert "averaged.py: loss `squared_hinge` (SquaredHinge): it returned a single number for 2 pairs" in err


def test_a_recipe_alone_never_imports_a_plugin(prefopt):
    status, _, err = prefopt("explain", "my.yaml", "--loss.name", "squared_hinge")
    assert (status, "there is no loss `squared_hinge`" in err) == (2, True)


# How it refuses

TRAIN = ("train", "my.yaml", "--output_dir", "runs/refused")

MISTAKES = {
    "a misspelt option": (
        (*TRAIN, "--learning_rte", "1"),
        "--learning_rte: there is no such setting. Did you mean",
    ),
    "a misspelt knob": ((*TRAIN, "--loss.bta", "1"), "--loss.bta: `dpo` does not read it. Did you mean `beta`?"),
    "a knob outside the block": ((*TRAIN, "--beta", "0.2"), "--beta: a knob of the loss. Write --loss.beta 0.2."),
    "a value out of range": ((*TRAIN, "--loss.beta", "0"), "--loss.beta: `dpo` takes a number above 0, not 0"),
    "a misspelt key in the file": (("train", "typo.yaml"), "typo.yaml:2: data_fles: there is no such setting."),
    "a missing data file": ((*TRAIN, "--data_files", "pair.jsonl"), "pair.jsonl: there is no such file. Did you mean"),
    "a wrong column": ((*TRAIN, "--data_files", "wrong.jsonl"), "wrong.jsonl:1: column `choosen`: the column is not"),
    "a missing model": ((*TRAIN, "--model_name_or_path", "tny"), "no tokenizer could be loaded from `tny`"),
    "no such recipe": (("train", "dpx"), "dpx: there is no recipe of this name, and no such file. Did you mean `dpo`?"),
    "no such loss": (("losses", "dppo"), "there is no loss `dppo`. Did you mean `dpo`? Losses: "),
    "a name of three methods": (("losses", "sdpo"), "`sdpo` is the name of three methods"),
    "no such plugin": (("losses", "--plugin", "mine.py"), "plugin mine.py: there is no such file"),
    "nothing to evaluate": (("evaluate", "tiny", "--data", "nope.jsonl"), "nope.jsonl: there is no such file."),
    "a launch setting as a recipe": (("recipe", "accelerate/one"), "accelerate/one: there is no recipe of this name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_its_message_alone(mistake, prefopt, folder):
    (folder / "typo.yaml").write_text(RECIPE.replace("data_files", "data_fles"))
    row = {"prompt": "a", "choosen": "b", "rejected": "c"}
    (folder / "wrong.jsonl").write_text(json.dumps(row) + "\n")
    arguments, message = MISTAKES[mistake]
    status, out, err = prefopt(*arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [("losses", "--all"), ("train",), (), ("evaluate", "tiny")])
def test_a_malformed_command_shows_the_usage(arguments, prefopt):
    status, _, err = prefopt(*arguments)
    assert (status, err.startswith("usage: prefopt")) == (2, True)


# The store of reference scores


def test_the_cache_is_listed_checked_and_cleared(prefopt, tmp_path):
    from prefopt.reference.store import Store

    place = ("--store", str(tmp_path))
    assert prefopt("cache", "ls", *place) == (0, f"{tmp_path}: 0 entries, 0.0 MB\n", "")
    entry = Store(tmp_path).entry("12" * 32, {"name": "tiny"})
    entry.write({bytes(32): np.ones(9, np.float32)})
    assert "121212121212  tiny" in prefopt("cache", "ls", *place)[1]
    assert prefopt("cache", "verify", *place) == (0, "every row is as it was written\n", "")
    entry.path.write_text("damaged")
    status, out, _ = prefopt("cache", "verify", *place)
    assert (status, f"{entry.path} is damaged (file is not a database)" in out) == (1, True)
    entry.open()
    assert f"would delete {entry.path} (" in prefopt("cache", "gc", *place, "--max_gb", "0", "--dry_run")[1]
    status, out, _ = prefopt("cache", "gc", *place)
    assert (status, "only damaged files go" in out, f"deleted {tmp_path}/_damaged-" in out) == (0, True, True)
    assert f"deleted {entry.path} (" in prefopt("cache", "gc", *place, "--older_than", "0")[1]
    assert prefopt("cache", "gc", *place, "--max_gb", "1.5") == (0, "nothing to delete\n", "")
    assert prefopt("cache", "gc", *place, "--max_gb", "much")[0] == 2
