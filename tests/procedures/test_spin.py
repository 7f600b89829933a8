"""SPIN as a procedure: its plan, what each round is trained on and against, and runs that were killed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefopt.data.messages import is_answer
from prefopt.errors import RecipeError, UserError
from prefopt.generation import shards
from prefopt.losses import load_plugin, names
from prefopt.models import load_model
from prefopt.procedures import MakeStage, TrainStage, make_plan, run_plan
from prefopt.procedures.inputs import inputs_of
from prefopt.procedures.pairing import read_data
from prefopt.procedures.rounds import BETA
from prefopt.procedures.spin import PAPER
from prefopt.recipe import load_recipe
from prefopt.reference.identity import identify
from prefopt.reference.record import record_reference
from tests.helpers import make_model, make_tokenizer
from tests.launching import on_two_ranks
from tests.procedures.spinning import prepare, rows_of, spin

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("spin")
    spin(prepare(folder))
    return folder / "run"


def plan_of(folder, block: str, *options: str):
    file = folder / "recipe.yaml"
    file.write_text(
        f"model_name_or_path: tiny\ndata_files: answers.jsonl\nloss: {{name: dpo}}\nprocedure: {block}\noutput_dir: r\n"
    )
    return make_plan(load_recipe(file, options))


def trained(plan):
    return [stage.recipe for stage in plan if isinstance(stage, TrainStage)]


def events(folder, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_papers_unless_told_otherwise(tmp_path):
    plan = plan_of(tmp_path, "{name: spin}")
    rounds = [f"{name}-{number}" for number in range(4) for name in ("answers", "pairs", "train")]
    assert [stage.name for stage in plan] == ["data", *rounds, "report"]
    assert [recipe.loss[0].knobs["beta"] for recipe in trained(plan)] == [0.1, 0.1, 0.1, 5.0]
    assert [recipe.training["learning_rate"] for recipe in trained(plan)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [recipe.training["num_train_epochs"] for recipe in trained(plan)] == [2.0] * 4
    pairs = [stage.settings["window"] for stage in plan if "window" in getattr(stage, "settings", {})]
    assert pairs == [[0], [0, 1], [1, 2], [2, 3]]
    answers = [stage.settings for stage in plan if stage.name.startswith("answers")]
    assert {(each["temperature"], each["top_p"], each["max_new_tokens"]) for each in answers} == {(1.0, 1.0, 256)}


def test_each_round_starts_from_the_model_of_the_one_before(tmp_path):
    plan = plan_of(tmp_path, "{name: spin, rounds: 3}")
    assert [recipe.model.model_name_or_path for recipe in trained(plan)] == ["tiny", "r/round-0", "r/round-1"]
    assert [str(stage.folder) for stage in plan if isinstance(stage, TrainStage)] == ["r/round-0", "r/round-1", "r"]
    assert all(recipe.reference.model is None for recipe in trained(plan))


def test_the_final_model_is_measured_where_there_is_data_for_it(tmp_path):
    names = [stage.name for stage in plan_of(tmp_path, "{name: spin, rounds: 1}", "--test_split_size", "0.1")]
    assert names == ["data", "answers-0", "pairs-0", "train-0", "answers-1", "report"]


def test_a_supervised_start_comes_before_the_first_answers(tmp_path):
    plan = plan_of(tmp_path, "{name: spin, rounds: 1, start: {learning_rate: 1e-4}}")
    assert [stage.name for stage in plan] == ["data", "start", "answers-0", "pairs-0", "train-0", "report"]
    start, main = trained(plan)
    assert start.loss[0].name == "sft" and start.data.data_files == {"train": "r/data/supervised.jsonl"}
    assert main.model.model_name_or_path == "r/start"
    assert "learning_rate" not in load_recipe(tmp_path / "recipe.yaml").training
    assert main.training["learning_rate"] == 5e-7


def test_values_for_all_rounds_and_values_that_go_on(tmp_path):
    block = "{name: spin, rounds: 3, beta: [2.0, 1.0], num_train_epochs: 3}"
    recipes = trained(plan_of(tmp_path, block, "--learning_rate", "1e-5"))
    assert [recipe.loss[0].knobs["beta"] for recipe in recipes] == [2.0, 1.0, 1.0]
    assert [recipe.training["learning_rate"] for recipe in recipes] == [1e-5] * 3
    assert [recipe.training["num_train_epochs"] for recipe in recipes] == [3.0] * 3


def test_a_beta_in_the_loss_holds_for_all_rounds(tmp_path):
    recipes = trained(plan_of(tmp_path, "{name: spin}", "--loss", "{name: hinge, beta: 0.7}"))
    assert {recipe.loss[0].knobs["beta"] for recipe in recipes} == {0.7}


@pytest.mark.parametrize("name", [name for name in names() if name not in ("sft", "kto")])
def test_any_pairwise_loss_has_a_plan(tmp_path, name):
    recipes = trained(plan_of(tmp_path, "{name: spin}", "--loss", f"{{name: {name}}}"))
    assert [recipe.loss[0].knobs.get(BETA) for recipe in recipes] in ([0.1, 0.1, 0.1, 5.0], [None] * 4)
    assert len(PAPER[BETA]) == 4


@pytest.mark.parametrize(
    ("block", "options", "said"),
    [
        ("{name: spin, round: 2}", (), "Did you mean `rounds`"),
        ("{name: spin, rounds: 0}", (), "procedure.rounds: must be a whole number from 1 on, not 0"),
        ("{name: spin, temperature: 0}", (), "would sample nothing"),
        ("{name: spin, top_p: 2}", (), "procedure.top_p"),
        ("{name: spin, top_p: many}", (), "procedure.top_p: must be a number"),
        ("{name: spin, beta: [1, two]}", (), "procedure.beta: must be a number above 0, or a list"),
        ("{name: spin, rounds: 1, beta: [1, 2]}", (), "more values than there are rounds"),
        ("{name: spin, history_window: 0}", (), "procedure.history_window"),
        ("{name: spin, append_eos_to_truncated: 1}", (), "must be true or false"),
        ("{name: spin, beta: 1}", ("--loss.beta", "2"), "contradicts `loss.beta`"),
        ("{name: spin, learning_rate: 1}", ("--learning_rate", "2e-6"), "contradicts `learning_rate`"),
        ("{name: spin, num_train_epochs: 1}", ("--max_steps", "5"), "no effect beside max_steps"),
        ("{name: spin, beta: 1}", ("--loss", "{name: slic}"), "procedure.beta: slic has none"),
        ("{name: spin}", ("--loss", "{name: kto}"), "SPIN compares two answers"),
        ("{name: spin}", ("--reference", "{model: x}"), r"reference\.model: the reference of each round"),
        ("{name: spin}", ("--data_files", "null"), "dataset_name: is missing"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, block, options, said):
    with pytest.raises(RecipeError, match=said):
        plan_of(tmp_path, block, *options)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They are slower than all the rest."""
    monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_the_reference_of_a_round_is_the_model_it_starts_from(finished):
    """Never the first model after round 0; and the answers were made by the same one."""
    for number, (start, folder) in enumerate([("../tiny", "round-0"), ("round-0", ".")]):
        weights = identify(load_model(str(finished / start))).weights
        assert json.loads((finished / folder / "reference.json").read_text())["weights"] == weights
        for part in ("own", "held_out"):
            files = (finished / f"round-{number}" / "answers" / part).glob("shard-*.jsonl")
            assert {row["model"] for file in files for row in rows_of(file)} == {weights}


def test_a_round_begins_with_the_loss_of_zero_margin(finished):
    for folder in (finished / "round-0", finished):
        assert events(folder, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
        assert events(folder, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)


def test_a_round_trains_on_the_answers_of_its_window(finished):
    rows = [rows_of(finished / f"round-{number}" / "pairs" / "pairs.jsonl") for number in range(2)]
    assert {row["round"] for row in rows[0]} == {0}
    assert {row["round"] for row in rows[1]} == {0, 1}
    assert [row for row in rows[1] if row["round"] == 0] == rows[0]
    real = {row["prompt"]: row["completion"] for row in rows_of(finished / "data" / "train.jsonl")}
    assert all(row["chosen"] == real[row["prompt"]] for row in rows[1])
    said = {
        (number, row["prompt"], row["text"])
        for number in range(2)
        for file in (finished / f"round-{number}" / "answers" / "own").glob("shard-*.jsonl")
        for row in rows_of(file)
    }
    assert {(row["round"], row["prompt"], row["rejected"]) for row in rows[1]} <= said


def test_answers_that_were_cut_off_get_no_end_marker(finished):
    records = {
        (row["prompt"], row["text"]): row["finished"]
        for file in (finished / "round-0" / "answers" / "own").glob("shard-*.jsonl")
        for row in rows_of(file)
    }
    for row in rows_of(finished / "round-0" / "pairs" / "pairs.jsonl"):
        done = records[row["prompt"], row["rejected"]]
        assert row["unfinished"] == ([] if done else ["rejected"])


def test_the_report_has_a_row_for_every_model(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = results["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(-7 < row["held_out/real_logp_per_token"] < -3 for row in rows)
    assert all(0 <= row["held_out/unfinished"] <= 1 and row["held_out/tokens"] <= 8 for row in rows)
    assert len({row["model"] for row in rows}) == 3
    assert rows[1]["train/pairs"] == len(rows_of(finished / "round-0" / "pairs" / "pairs.jsonl"))
    card = (finished / "README.md").read_text()
    assert card.count("## Rounds") == 1 and card.index("## Rounds") < card.index("## Data")
    assert "plots/rounds.png" in card and (finished / "plots" / "rounds.png").is_file()
    assert load_recipe(finished / "report" / "recipe.yaml").procedure["rounds"] == 2


def test_the_likelihood_in_the_report_is_that_of_the_models_own_logits(finished):
    row = json.loads((finished / "results.json").read_text())["rounds"][1]
    model, tokenizer = load_model(str(finished / "round-0")), make_tokenizer()
    total, count = 0.0, 0
    for answer in rows_of(finished / "data" / "test.jsonl"):
        prompt = tokenizer(answer["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(answer["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        scored = range(len(prompt), len(ids))
        total += sum(float(logp[place - 1, ids[place]]) for place in scored)
        count += len(scored)
    assert row["held_out/real_logp_per_token"] == pytest.approx(total / count, abs=1e-4)


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.procedures.answers.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    run_plan(make_plan(load_recipe(finished.parent / "recipe.yaml")))
    assert capsys.readouterr().out.count("done before") == 9


def test_the_first_round_is_a_plain_run_on_its_pairs(finished, tmp_path):
    """With the loss's own beta, the start as reference, and nothing else: to the bit."""
    file = tmp_path / "plain.yaml"
    text = (finished.parent / "recipe.yaml").read_text()
    file.write_text(text[: text.index("procedure:")] + text[text.index("output_dir:") :])
    pairs = finished / "round-0" / "pairs"
    files = f"{{train: {pairs}/pairs.jsonl, test: {pairs}/test_pairs.jsonl}}"
    options = ["--loss.beta", "0.5", "--learning_rate", "1e-2", "--num_train_epochs", "2", "--data_files", files]
    run_plan(make_plan(load_recipe(file, [*options, "--output_dir", str(tmp_path / "plain")])))
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (finished / "round-0", tmp_path / "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_measured_is_a_figure_of_each_round_and_trains_nothing(finished, tmp_path):
    """The mean over all held-out answers, those that were cut off among them."""
    (tmp_path / "length.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    load_plugin(tmp_path / "length.py")
    spin(prepare(tmp_path), "--procedure.measure", "{characters: {function: length.py:length}}")
    run = tmp_path / "run"
    for number, row in enumerate(json.loads((run / "results.json").read_text())["rounds"]):
        shards = sorted((run / f"round-{number}" / "answers" / "held_out").glob("shard-*.jsonl"))
        lengths = [len(answer["text"]) for shard in shards for answer in rows_of(shard) if is_answer(answer["text"])]
        assert row["measured/characters"] == pytest.approx(sum(lengths) / len(lengths))
        assert row["held_out/unfinished"] > 0
    assert "| round | characters |" in (run / "README.md").read_text()
    ours, theirs = load_file(run / WEIGHTS), load_file(finished / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    """Stands for a signal that leaves no time to tidy up."""


def in_generation(monkeypatch):
    """Killed in round 1, when one of its shards is there."""
    stock, written = shards._write_shard, []

    def write(folder, *args):
        if folder.parent.parent.name == "round-1" and written:
            raise Killed
        stock(folder, *args)
        written.extend([1] if folder.parent.parent.name == "round-1" else [])

    monkeypatch.setattr(shards, "_write_shard", write)


def in_training(monkeypatch):
    """Killed in the last round, behind its first checkpoint."""
    from prefopt.trainer import PreferenceTrainer

    stock = PreferenceTrainer.training_step

    def step(self, *args, **kwargs):
        if self.args.output_dir.endswith("run") and self.state.global_step == 3:
            raise Killed
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", step)


def between_stages(monkeypatch):
    """Killed when the pairs of round 1 are written and not yet marked as done."""
    import prefopt.procedures.spin as module

    stock = module.make_pairs

    def make(recipe, data, folder, settings, number):
        counts = stock(recipe, data, folder, settings, number)
        if number == 1:
            raise Killed
        return counts

    monkeypatch.setattr(module, "make_pairs", make)


@pytest.mark.parametrize("kill", [in_generation, in_training, between_stages])
def test_a_run_that_was_killed_ends_with_the_same_bits(finished, tmp_path, kill, monkeypatch):
    file = prepare(tmp_path)
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            spin(file)
    spin(file)
    run = tmp_path / "run"
    for folder in (".", "round-0"):
        ours, theirs = load_file(run / folder / WEIGHTS), load_file(finished / folder / WEIGHTS)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for number in range(2):
        name = f"round-{number}/pairs/pairs.jsonl"
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_round_against_another_opponent_is_refused(finished, tmp_path):
    run = tmp_path / "run"
    for name in ("tiny", "answers.jsonl", "held_out.jsonl", "run"):
        source = finished.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    file = tmp_path / "recipe.yaml"
    file.write_text((finished.parent / "recipe.yaml").read_text().replace(str(finished.parent), str(tmp_path)))
    record_reference(run / "round-0", identify(make_model(seed=9)), "another")
    (stage,) = [stage for stage in make_plan(load_recipe(file)) if stage.name == "answers-1"]
    assert isinstance(stage, MakeStage)
    with pytest.raises(UserError, match="its reference is not the model that made the answers"):
        stage.make()


def test_an_edited_start_model_is_seen(tmp_path):
    file = prepare(tmp_path)
    recipe = load_recipe(file)
    plan = make_plan(recipe)
    run_plan(plan[:2])
    make_model(seed=9, vocab_size=len(make_tokenizer())).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="model: "):
        run_plan(make_plan(recipe))


TEMPLATE = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}{% endfor %}"


def test_answers_sampled_with_another_chat_template_are_not_used(tmp_path):
    file = prepare(tmp_path, chat=True)
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE + "<|assistant|>")
    answers = make_plan(load_recipe(file, ["--chat_template_path", str(template)]))[1]
    before = inputs_of(answers)
    template.write_text(TEMPLATE)
    assert {name for name in before if inputs_of(answers)[name] != before[name]} == {"template"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_revision", "main"),
        ("tokenizer_name_or_path", "other"),
        ("dtype", "bfloat16"),
        ("chat_template_kwargs", "{enable_thinking: false}"),
        ("max_length", "64"),
    ],
)
def test_what_answers_are_sampled_and_measured_with_is_a_fact_of_their_stage(tmp_path, option, value):
    file = prepare(tmp_path)
    before, after = (inputs_of(make_plan(load_recipe(file, options))[1]) for options in ([], [f"--{option}", value]))
    assert before[option] != after[option]


def test_answers_of_the_data_that_were_cut_off_stay_so(tmp_path):
    file = prepare(tmp_path)
    rows = [{**row, "unfinished": ["completion"]} for row in rows_of(tmp_path / "answers.jsonl")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_plan(make_plan(load_recipe(file))[:3])
    assert {example.unfinished for example in read_data(tmp_path / "run" / "data" / "train.jsonl")} == {("completion",)}
    assert {example.unfinished for example in read_data(tmp_path / "run" / "data" / "test.jsonl")} == {()}
    pairs = rows_of(tmp_path / "run" / "round-0" / "pairs" / "pairs.jsonl")
    assert pairs and all("chosen" in row["unfinished"] for row in pairs)
    held_out = rows_of(tmp_path / "run" / "round-0" / "pairs" / "test_pairs.jsonl")
    assert held_out and all("chosen" not in row["unfinished"] for row in held_out)


def test_real_answers_have_no_part_in_what_is_sampled(finished, tmp_path):
    file = prepare(tmp_path)
    rows = rows_of(tmp_path / "answers.jsonl")
    changed = [{**row, "completion": " something else"} for row in rows]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    run_plan(make_plan(load_recipe(file))[:2])
    for shard in (finished / "round-0" / "answers" / "own").glob("shard-*.jsonl"):
        assert (tmp_path / "run" / "round-0" / "answers" / "own" / shard.name).read_bytes() == shard.read_bytes()


def test_old_pairs_are_scored_anew(finished):
    """The starting margins of the second round are 0 on all pairs, those of round 0 included."""
    reference = json.loads((finished / "reference.json").read_text())["key"]
    assert reference != json.loads((finished / "round-0" / "reference.json").read_text())["key"]
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert first["logratios/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["logratios/rejected"] == pytest.approx(0, abs=1e-4)


def test_random_weights_need_a_start(tmp_path):
    scratch = "{model_type: llama, vocab_size: 300, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    options = ("--model_name_or_path", "null", "--from_scratch", scratch)
    with pytest.raises(RecipeError, match=r"procedure\.start: is missing"):
        plan_of(tmp_path, "{name: spin}", *options)
    assert plan_of(tmp_path, "{name: spin, start: {}}", *options)[1].name == "start"


def test_many_epochs_at_a_small_beta_are_warned_of(tmp_path, capsys):
    options = ["--procedure", "{name: spin, rounds: 1, beta: 0.1, learning_rate: 1e-3, num_train_epochs: 6, "]
    options[1] += "max_new_tokens: 4}"
    spin(prepare(tmp_path), *options)
    assert (
        "6 epochs at beta 0.1. A round that is trained to convergence moves the model away" in capsys.readouterr().out
    )


@pytest.mark.parametrize("part", ["own", "held_out"])
def test_a_round_needs_a_usable_answer_to_train_on_and_none_to_test_on(tmp_path, capsys, part):
    recipe = load_recipe(prepare(tmp_path))
    *before, pairs = make_plan(recipe)[:3]
    run_plan(before)
    answers = tmp_path / "run" / "round-0" / "answers" / part
    manifest = json.loads((answers / "manifest.json").read_text())
    for name in manifest["shards"]:
        text = "".join(json.dumps({**row, "text": " "}) + "\n" for row in rows_of(answers / name))
        (answers / name).write_text(text)
        manifest["shards"][name] = hashlib.sha256(text.encode()).hexdigest()
    (answers / "manifest.json").write_text(json.dumps(manifest))
    if part == "own":
        with pytest.raises(UserError, match="round 0: no pair could be made: every answer"):
            pairs.make()
        return
    pairs.make()
    assert "no held-out pair could be made: every answer" in capsys.readouterr().out
    assert not (pairs.folder / "test_pairs.jsonl").exists()


def test_conversations_are_rendered_alike_for_sampling_and_training(tmp_path):
    file = prepare(tmp_path, chat=True)
    spin(file, "--procedure.rounds", "1", "--procedure.beta", "1.0", "--procedure.learning_rate", "1e-3")
    rows = rows_of(tmp_path / "run" / "round-0" / "pairs" / "pairs.jsonl")
    assert all(row["rejected"][0]["role"] == "assistant" for row in rows)
    assert events(tmp_path / "run", "loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_supervised_start_reads_all_rows_and_the_rounds_a_part_of_them(tmp_path):
    file = prepare(tmp_path)
    options = ["--procedure", "{name: spin, prompts: 5, eval_prompts: 3, start: {learning_rate: 1e-3}}"]
    run_plan(make_plan(load_recipe(file, options))[:2])
    counts = {
        name: len(rows_of(tmp_path / "run" / "data" / f"{name}.jsonl")) for name in ("supervised", "train", "test")
    }
    assert counts == {"supervised": 12, "train": 5, "test": 3}
    results = json.loads((tmp_path / "run" / "start" / "results.json").read_text())
    assert results["data"]["train"]["kept"] == 12


def test_an_adapter_goes_on_and_its_start_is_the_reference(tmp_path):
    """Not the base with the adapter off, which is the reference of the first round alone."""
    adapter = ("--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0.0", "--lora_target_modules", "[q_proj]")
    spin(prepare(tmp_path), *adapter)
    run = tmp_path / "run"
    first = identify(load_model(str(run / "round-0"))).weights
    assert json.loads((run / "reference.json").read_text())["weights"] == first
    shards = (run / "round-1" / "answers" / "own").glob("shard-*.jsonl")
    assert {row["model"] for shard in shards for row in rows_of(shard)} == {first}
    assert events(run, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_two_ranks_sample_the_same_answers_and_train_the_same_models(finished, tmp_path):
    """Rounds sample from models that agree up to rounding, so answers of round 1 might differ; here none does."""
    file = prepare(tmp_path)
    on_two_ranks("scripts/train.py", str(file), "--per_device_train_batch_size", "2")
    for number in range(2):
        for shard in (finished / f"round-{number}" / "answers" / "own").glob("shard-*.jsonl"):
            theirs = rows_of(tmp_path / "run" / f"round-{number}" / "answers" / "own" / shard.name)
            assert [row["text"] for row in theirs] == [row["text"] for row in rows_of(shard)]
    for folder in ("round-0", "."):
        ours, theirs = (load_file(run / folder / WEIGHTS) for run in (finished, tmp_path / "run"))
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, atol=1e-4, rtol=0)
