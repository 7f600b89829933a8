"""Online rounds: what is judged, what becomes a pair, and runs that were killed."""

from __future__ import annotations

import hashlib
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from prefopt.errors import RecipeError, UserError
from prefopt.judges.command import CONSENT
from prefopt.losses import load_plugin
from prefopt.procedures import TrainStage, judging, make_plan, run_plan
from prefopt.recipe import load_recipe
from tests.helpers import text_pairs
from tests.procedures.spinning import ends_often, prepare, rows_of

JUDGE = "def length(prompt, answer):\n    return len(answer) % 7\n"
BLOCK = """{{name: online, rounds: 2, samples_per_prompt: 3, learning_rate: 1e-2, num_train_epochs: 1,
  max_new_tokens: 40, shard_size: 9, judge: {judge}{more}}}"""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They are slower than all the rest."""
    monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])


def recipe_in(folder, *, judge: str = "{function: my_judge.py:length}", more: str = "", **changes):
    """A recipe over rows that are prompts alone, and a tiny model whose answers end often."""
    file = prepare(folder)
    ends_often(folder / "tiny")
    for name, count, seed in (("answers", 10, 0), ("held_out", 4, 1)):
        rows = [{"prompt": row["prompt"]} for row in text_pairs(count, seed=seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_judge.py").write_text(JUDGE)
    load_plugin(folder / "my_judge.py")
    block = " ".join(BLOCK.format(judge=judge, more=more).split())
    options = [f"--{name}={value}" for name, value in changes.items()]
    return load_recipe(file, ["--procedure", block, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])
        run_plan(make_plan(recipe_in(folder)))
    return folder / "run"


def test_the_plan(tmp_path):
    plan = make_plan(recipe_in(tmp_path))
    rounds = [f"{name}-{number}" for number in range(2) for name in ("answers", "judged", "pairs", "train")]
    assert [stage.name for stage in plan] == ["data", *rounds, "answers-2", "judged-2", "report"]
    models = [stage.recipe.model.model_name_or_path for stage in plan if isinstance(stage, TrainStage)]
    assert models == [str(tmp_path / "tiny"), str(tmp_path / "run" / "round-0")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "{}"}, "procedure.judge: is missing"),
        ({"judge": "{function: a, endpoint: b}"}, "has 2"),
        ({"more": ", samples_per_promt: 2"}, "Did you mean `samples_per_prompt`"),
        ({"more": ", history_window: 2"}, "not read by this procedure"),
        ({"reference": "{model: x}"}, "the reference of each round"),
        ({"data_files": "null"}, "dataset_name: is missing"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        make_plan(recipe_in(tmp_path, **changes))


def test_one_answer_has_no_other_to_lose_to(tmp_path):
    block = {"name": "online", "samples_per_prompt": 1, "judge": {"function": "a"}}
    with pytest.raises(RecipeError, match="must be at least 2"):
        make_plan(recipe_in(tmp_path).replace(procedure=block))


def test_pairs_are_the_best_against_the_worst_that_ended(finished):
    records = {}
    for shard in sorted((finished / "round-0" / "answers" / "own").glob("shard-*.jsonl")):
        for row in rows_of(shard):
            if row["finished"] and row["text"].strip() and not re.search("[\x00-\x08\x0e-\x1a\x1c-\x1f]", row["text"]):
                records.setdefault(row["prompt"], []).append(row["text"])
    pairs = rows_of(finished / "round-0" / "pairs" / "pairs.jsonl")
    assert pairs
    for row in pairs:
        scores = [len(text) % 7 for text in records[row["prompt"]]]
        assert (row["score_chosen"], row["score_rejected"]) == (max(scores), min(scores))
        assert (len(row["chosen"]) % 7, len(row["rejected"]) % 7) == (max(scores), min(scores))
        assert {row["chosen"], row["rejected"]} <= set(records[row["prompt"]])
    differ = {prompt for prompt, texts in records.items() if len({len(text) % 7 for text in texts}) > 1}
    assert {row["prompt"] for row in pairs} == differ


@pytest.mark.parametrize("part", ["own", "held_out"])
def test_a_judge_without_a_preference_leaves_nothing_to_train_on_or_to_test_on(tmp_path, monkeypatch, part):
    plan = make_plan(recipe_in(tmp_path))
    run_plan(plan[:3])
    stock = judging.best_against_worst

    def undecided(examples, folder, **options):
        rows, counts = stock(examples, folder, **options)
        return ([] if folder.name == part else rows), counts

    monkeypatch.setattr(judging, "best_against_worst", undecided)
    if part == "own":
        with pytest.raises(UserError, match=r"the judge prefers no answer to train\.jsonl, so there are no pairs"):
            plan[3].make()
        return
    plan[3].make()
    assert [path.name for path in plan[3].folder.iterdir()] == ["pairs.jsonl"]


def test_the_judges_code_is_kept_with_the_run(finished):
    assert (finished / "plugins" / "my_judge.py").read_text() == JUDGE
    assert "--plugin plugins/my_judge.py" in (finished / "README.md").read_text()


def test_the_report_has_the_judges_scores(finished):
    rows = json.loads((finished / "results.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    lines = rows_of(finished / "round-1" / "judged" / "held_out" / "scores.jsonl")
    scores = [score for line in lines for score in line["scores"]]
    assert rows[1]["held_out/score"] == pytest.approx(sum(scores) / len(scores))
    assert "| score " in (finished / "README.md").read_text()


class Killed(BaseException):
    """Stands for a signal that leaves no time to tidy up."""


def test_a_run_that_was_killed_while_judging_goes_on_and_judges_nothing_twice(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "CHUNK", 4)
    recipe, judged, stock = recipe_in(tmp_path), [], judging._judged
    limit = [6]

    def counted(judge, records, **options):
        if len(judged) == limit[0]:
            raise Killed
        judged.append(records[0]["prompt"])
        return stock(judge, records, **options)

    monkeypatch.setattr(judging, "_judged", counted)
    with pytest.raises(Killed):
        run_plan(make_plan(recipe))
    limit[0] = -1
    run_plan(make_plan(recipe))
    # Two rounds and the final model, 14 prompts each; the chunk that was cut off is judged once more.
    assert len(judged) == 3 * 4 + 2 * 10 + 2
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scores_of_another_judge_are_not_used(tmp_path):
    run_plan(make_plan(recipe_in(tmp_path))[:3])
    folder = tmp_path / "run" / "round-0"
    (tmp_path / "other.py").write_text("def other(prompt, answer):\n    return -len(answer)\n")
    load_plugin(tmp_path / "other.py")
    judged = folder / "judged" / "own"
    before = rows_of(judged / "scores.jsonl")
    figures = judging.judge_answers({"function": "other.py:other"}, folder / "answers" / "own", judged)
    after = rows_of(judged / "scores.jsonl")
    assert figures["score"] < 0
    assert [line["answers"] for line in after] == [line["answers"] for line in before]
    assert all(score < 0 for line in after for score in line["scores"])


def test_scores_of_other_answers_of_the_same_model_are_not_used(tmp_path):
    run_plan(make_plan(recipe_in(tmp_path))[:3])
    answers, judged = (tmp_path / "run" / "round-0" / name / "own" for name in ("answers", "judged"))
    manifest = json.loads((answers / "manifest.json").read_text())
    for name in manifest["shards"]:
        rows = [{**row, "text": "a cat", "finished": True} for row in rows_of(answers / name)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (answers / name).write_text(text)
        manifest["shards"][name] = hashlib.sha256(text.encode()).hexdigest()
    (answers / "manifest.json").write_text(json.dumps(manifest))
    judging.judge_answers({"function": "my_judge.py:length"}, answers, judged)
    assert {text for line in rows_of(judged / "scores.jsonl") for text in line["answers"]} == {"a cat"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_judging_has_cost_is_said_of_every_rank(finished, tmp_path, monkeypatch, capsys, ranks):
    class Dear:
        summary = "7 calls"

        def scores(self, prompt, answers):
            return [1.0] * len(answers)

    monkeypatch.setattr(judging, "open_judge", lambda block: Dear())
    monkeypatch.setattr(judging, "gather_object", lambda own: own * ranks)
    judging.judge_answers({"function": "my_judge.py:length"}, finished / "round-0" / "answers" / "own", tmp_path)
    said = {1: "judge: 7 calls\n", 2: "judge, process 0: 7 calls\njudge, process 1: 7 calls\n"}
    assert said[ranks] in capsys.readouterr().out


def test_a_plain_sample_of_the_reference_is_the_target(tmp_path):
    recipe = recipe_in(tmp_path, more=", sample_targets: true", loss="{name: slic}")
    run_plan(make_plan(recipe)[:5])
    lines = {line["prompt_index"]: line for line in rows_of(tmp_path / "run/round-0/judged/own/scores.jsonl")}
    prompts = [row["prompt"] for row in rows_of(tmp_path / "run" / "data" / "train.jsonl")]
    for row in rows_of(tmp_path / "run" / "round-0" / "pairs" / "pairs.jsonl"):
        assert row["target"] == lines[prompts.index(row["prompt"])]["answers"][0]


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("{command: [no-such-program]}", f"set {CONSENT}=1"),
        ("{endpoint: localhost, model: m}", "is no address"),
        ("{function: not_named.py:score}", "a recipe alone never imports code"),
    ],
)
def test_a_judge_that_cannot_be_opened_is_refused_before_anything_is_sampled(tmp_path, monkeypatch, judge, said):
    monkeypatch.delenv(CONSENT, raising=False)
    with pytest.raises(UserError, match=said):
        run_plan(make_plan(recipe_in(tmp_path, judge=judge))[:1])


def test_a_command_judges_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv(CONSENT, "1")
    program = tmp_path / "judge.py"
    program.write_text(
        "import json, sys\nfor line in sys.stdin:\n"
        "    print(json.dumps({'scores': [len(a) for a in json.loads(line)['answers']]}), flush=True)\n"
    )
    run_plan(make_plan(recipe_in(tmp_path, judge=f"{{command: [{sys.executable}, {program}]}}"))[:4])
    pairs = rows_of(tmp_path / "run" / "round-0" / "pairs" / "pairs.jsonl")
    assert pairs and all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)


def test_an_edited_judge_is_another_judge(tmp_path):
    recipe = recipe_in(tmp_path)
    run_plan(make_plan(recipe)[:3])
    (tmp_path / "my_judge.py").write_text(JUDGE.replace("% 7", "% 5"))
    load_plugin(tmp_path / "my_judge.py")
    with pytest.raises(UserError, match="file: "):
        run_plan(make_plan(recipe)[:3])
