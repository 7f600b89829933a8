"""Rounds in an environment: which trajectories make pairs, what a killed run does again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prefopt.data import DataSpec, load_examples
from prefopt.data.formats import Example
from prefopt.data.segments import selector_of
from prefopt.errors import DataError, RecipeError, UserError
from prefopt.losses import load_plugin
from prefopt.procedures import TrainStage, episodes, make_plan, run_plan
from prefopt.procedures.episodes import trajectory_pairs
from prefopt.recipe import load_recipe
from prefopt.world.social import expert_sessions
from tests.procedures.spinning import ends_often, prepare, rows_of

ENVIRONMENT = """
class Talk:
    def __init__(self, task):
        self.left, self.reward = task["turns"], 0.0

    def step(self, text):
        self.left -= 1
        self.reward += len(text) % 5 - 2
        return f"and {len(text) % 3}" if self.left else None


def make(task):
    return Talk(task)
"""
BLOCK = """{{name: online, rounds: 2, learning_rate: 1e-2, num_train_epochs: 1, max_turns: 3, max_new_tokens: 40,
  generation_batch_size: 4, shard_size: 4, environment: {environment}{more}}}"""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They are slower than all the rest."""
    monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])


def recipe_in(folder, *, environment: str = "{function: my_env.py:make}", more: str = "", **changes):
    """A recipe over expert trajectories of two turns, and a tiny model whose turns end often."""
    file = prepare(folder)
    ends_often(folder / "tiny")
    for name, count in (("answers", 16), ("held_out", 6)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(task(number)) + "\n" for number in range(count)))
    (folder / "my_env.py").write_text(ENVIRONMENT)
    load_plugin(folder / "my_env.py")
    block = " ".join(BLOCK.format(environment=environment, more=more).split())
    options = [f"--{name}={value}" for name, value in {"loss": "{name: eto}", **changes}.items()]
    return load_recipe(file, ["--procedure", block, *options])


def says(*texts: str) -> list[dict[str, str]]:
    """Messages of the assistant and the user in turn, the assistant first."""
    return [{"role": ("assistant", "user")[place % 2], "content": text} for place, text in enumerate(texts)]


def task(number: int) -> dict:
    completion = says(f"the cat {number}", "and 0", "red birds")
    return {"prompt": [{"role": "user", "content": f"task {number}"}], "completion": completion, "reward": 0.5,
            "turns": 1 + number % 3}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("exploring")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])
        run_plan(make_plan(recipe_in(folder)))
    return folder / "run"


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan(tmp_path):
    plan = make_plan(recipe_in(tmp_path))
    rounds = [f"{name}-{number}" for number in range(2) for name in ("explore", "pairs", "train")]
    assert [stage.name for stage in plan] == ["data", *rounds, "explore-2", "report"]
    models = [stage.recipe.model.model_name_or_path for stage in plan if isinstance(stage, TrainStage)]
    assert models == [str(tmp_path / "tiny"), str(tmp_path / "run" / "round-0")]


def test_the_shipped_recipe_has_the_authors_settings_and_needs_no_data():
    plan = make_plan(load_recipe("eto_rounds"))
    assert [stage.name for stage in plan][:3] == ["tasks", "data", "start"]
    rounds = [stage.recipe for stage in plan if isinstance(stage, TrainStage)][1:]
    assert [recipe.loss[0].knobs["beta"] for recipe in rounds] == [0.1, 0.5, 0.5]
    assert {recipe.training["num_train_epochs"] for recipe in rounds} == {3.0}
    assert {recipe.training["lr_scheduler_type"] for recipe in rounds} == {"constant_with_warmup"}
    rates = [recipe.training["learning_rate"] for recipe in rounds]
    assert rates[1] == rates[2] == rates[0] / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": "{functoin: a}"}, r"procedure\.environment: must be"),
        ({"environment": "{social_world: {}}"}, "data_files: contradicts"),
        ({"environment": "{social_world: {task: 3}}", "data_files": "null"}, "Did you mean `tasks`"),
        ({"environment": "{social_world: {tasks: 0}}", "data_files": "null"}, "tasks is 0; it must be at least 1"),
        ({"more": ", max_turn: 3"}, "Did you mean `max_turns`"),
        ({"more": ", judge: {function: a}"}, r"procedure\.judge: not read by this procedure"),
        ({"more": ", select: 2"}, "`2` is none of single_turn, fixed:N, to_end"),
        ({"more": ", select: mine.py:f"}, "none of single_turn"),
        ({"more": ", success: high"}, r"procedure\.success: must be a number"),
        ({"reference": "{model: x}"}, "the reference of each round"),
        ({"data_files": "null"}, "dataset_name: is missing"),
        ({"loss": "{name: kto}"}, "reads single answers"),
        ({"more": ", use_vllm: true"}, r"procedure\.use_vllm: has no effect"),
        ({"more": ", measure: {kind: {world: reward}}"}, r"procedure\.measure: has no effect"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        make_plan(recipe_in(tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": "much"}, "column `reward`: .*not a number"),
        ({"reward": None}, "column `reward`"),
        ({"prompt": "task", "completion": "done"}, "a task is a conversation"),
    ],
)
def test_rows_that_are_no_tasks_are_refused_with_their_place(tmp_path, change, said):
    recipe = recipe_in(tmp_path)
    rows = [task(0), {**task(1), **change}] if "prompt" not in change else [{**task(1), **change}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"answers\.jsonl:{len(rows)}.*{said}"):
        run_plan(make_plan(recipe)[:1])


def test_a_task_without_a_reward_is_told_that_the_procedure_needs_one(tmp_path):
    recipe = recipe_in(tmp_path)
    row = {name: value for name, value in task(0).items() if name != "reward"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl:1: column `reward`: the procedure needs this column"):
        run_plan(make_plan(recipe)[:1])


@pytest.mark.parametrize("scratch", [False, True])
def test_turns_longer_than_the_model_reads_are_refused_before_anything_is_trained(tmp_path, scratch):
    block = " ".join(BLOCK.format(environment="{function: my_env.py:make}", more=", start: {}").split())
    tokens = 300 if scratch else 10**6
    changes = {"procedure": block.replace("max_new_tokens: 40", f"max_new_tokens: {tokens}")}
    if scratch:
        changes |= {"from_scratch": "{model_type: llama, max_position_embeddings: 256}", "model_name_or_path": "null"}
    recipe_in(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"--{name}={value}" for name, value in changes.items()])
    with pytest.raises(UserError, match=f"max_new_tokens: a turn of {tokens} tokens leaves no room for the task"):
        run_plan(make_plan(recipe)[:1])


def test_an_environment_that_is_not_there_is_refused_before_anything_is_played(tmp_path):
    with pytest.raises(UserError, match="a recipe alone never imports code"):
        run_plan(make_plan(recipe_in(tmp_path, environment="{function: no_env.py:make}"))[:1])
    with pytest.raises(UserError, match="has no function `begin`"):
        run_plan(make_plan(recipe_in(tmp_path, environment="{function: my_env.py:begin}"))[:1])


# ---- pairs ----------------------------------------------------------------------------------------------------------


def pairs_of(folder, lines, *, expert_turns=1, select=None, **task_fields):
    """Pairs of one task's expert with these episodes `(turns, reward, ended)`."""
    expert = says(*["right", "go on"] * (expert_turns - 1), "right")
    prompt = [{"role": "user", "content": "begin"}]
    example = Example("", prompt, completion=expert, columns={"reward": 1.0}, **task_fields)
    rows = [
        {"messages": says(*["wrong", "hm"] * (turns - 1), "wrong")[: 2 * turns], "reward": reward, "ended": ended}
        for turns, reward, ended in lines
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trajectory_pairs([example] * len(rows), folder, None if select is None else selector_of(select))


def test_whoever_earned_more_is_chosen_and_ties_make_no_pair(tmp_path):
    rows, counts = pairs_of(tmp_path, [(1, 0.0, "over"), (1, 2.0, "turn_limit"), (1, 1.0, "over")])
    lost, won = rows
    assert (lost["chosen"], lost["rejected"]) == (says("right"), says("wrong"))
    assert (won["chosen"], won["rejected"]) == (says("wrong"), says("right"))
    assert [(row["score_chosen"], row["score_rejected"]) for row in rows] == [(1.0, 0.0), (2.0, 1.0)]
    assert counts == {"ties": 1, "pairs": 2}


def test_a_failure_is_cut_to_the_experts_turns_and_five_more(tmp_path):
    (lost, won), _ = pairs_of(tmp_path, [(12, 0.0, "turn_limit"), (12, 2.0, "over")], expert_turns=2)
    assert sum(message["role"] == "assistant" for message in lost["rejected"]) == 7
    assert lost["rejected"][-1]["role"] == "assistant"
    assert sum(message["role"] == "assistant" for message in won["chosen"]) == 12


def test_an_episode_that_stopped_before_a_turn_makes_no_pair(tmp_path):
    ends = [(1, 0.0, ended) for ended in ("cut_off", "no_text", "no_room", "over")]
    rows, counts = pairs_of(tmp_path, ends)
    assert (len(rows), counts["left out: cut off, no text or no room"]) == (1, 3)


def test_an_expert_that_was_cut_off_stays_so(tmp_path):
    rows, _ = pairs_of(tmp_path, [(1, 0.0, "over"), (1, 2.0, "over")], unfinished=("completion",))
    assert [row["unfinished"] for row in rows] == [["chosen"], ["rejected"]]


def test_segments_of_the_pairs_are_equally_long_and_begin_where_they_part(tmp_path):
    rows, counts = pairs_of(tmp_path, [(4, 0.0, "over")], expert_turns=2, select="to_end")
    assert rows[0]["segments"] == {"chosen": [0, 1], "rejected": [0, 1]}
    rules = {"optional_columns": ("segments", "turn_weights"), "paired": True}
    assert load_examples(DataSpec(rows=rows), **rules).examples
    assert counts == {"pairs": 1}


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_episodes_of_the_model_the_round_starts_from(finished):
    for number in range(2):
        folder = finished / f"round-{number}"
        lines = rows_of(folder / "explored" / "own" / "episodes.jsonl")
        differ = {line["task"]: line for line in lines if line["ended"] in ("over", "turn_limit")}
        pairs = rows_of(folder / "pairs" / "pairs.jsonl")
        assert len(pairs) == len(differ) > 2
        for row, (place, line) in zip(pairs, differ.items(), strict=True):
            better, worse = ("chosen", "rejected") if line["reward"] > 0.5 else ("rejected", "chosen")
            assert row["prompt"] == task(place)["prompt"]
            assert (row[better], row[worse]) == (line["messages"], task(place)["completion"])
        for line in differ.values():
            assert line["turns"] == min(3, task(line["task"])["turns"]) and line["ended"] == "over"


def test_the_report_has_the_figures_of_every_round(finished):
    rows = json.loads((finished / "results.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows:
        folder = finished / f"round-{row['round']}" / "explored"
        lines = rows_of(folder / "held_out" / "episodes.jsonl")
        assert row["held_out/reward"] == pytest.approx(sum(line["reward"] for line in lines) / 6)
        assert row["held_out/success"] == sum(line["reward"] >= 1 for line in lines) / 6
        assert row["held_out/turns"] == sum(line["turns"] for line in lines) / 6
    assert len({row["model"] for row in rows}) == 3
    assert 0 <= rows[0]["own/ties"] < 1 and rows[0]["own/cut_off"] > 0
    page = (finished / "README.md").read_text()
    assert "| reward | success |" in page and "had no room left" in page


def test_another_success_plays_nothing_again_and_counts_anew(finished, tmp_path, capsys):
    run_plan(make_plan(recipe_in(tmp_path))[:2])
    other = make_plan(recipe_in(tmp_path, more=", success: -99"))
    run_plan(other[:2])
    assert capsys.readouterr().out.count("done before") == 2
    shutil.copytree(finished, tmp_path / "run", dirs_exist_ok=True)
    rows = other[-1].make()
    assert [row["held_out/success"] for row in rows] == [1.0] * 3
    before = json.loads((finished / "results.json").read_text())["rounds"]
    assert [row["held_out/reward"] for row in rows] == [row["held_out/reward"] for row in before]


def test_all_embedded_tasks_are_tried_unless_the_recipe_says_how_many(tmp_path):
    many = ["--procedure.environment", "{social_world: {tasks: 3, test_tasks: 1000}}"]
    assert "at most 1000 held-out" in make_plan(load_recipe("eto_rounds", many))[1].summary
    few = make_plan(load_recipe("eto_rounds", [*many, "--procedure.eval_prompts", "20"]))[1]
    assert few.settings["eval_prompts"] == 20 and "at most 20 held-out" in few.summary


class Killed(BaseException):
    """Like a signal that leaves no time to tidy up."""


def test_a_run_that_was_killed_while_exploring_goes_on_and_plays_nothing_twice(finished, tmp_path, monkeypatch):
    recipe, tried, stock, limit = recipe_in(tmp_path), [], episodes.play, [7]

    def counted(environment, tasks, *rest, **options):
        if len(tried) == limit[0]:
            raise Killed
        tried.append(list(tasks))
        return stock(environment, tasks, *rest, **options)

    monkeypatch.setattr(episodes, "play", counted)
    with pytest.raises(Killed):
        run_plan(make_plan(recipe))
    assert len(list((tmp_path / "run" / "round-1" / "explored" / "held_out").glob("_*.jsonl"))) == 1
    limit[0] = -1
    run_plan(make_plan(recipe))
    # Two stretches of held-out tasks and four of the others, the latter not for the final model.
    assert len(tried) == 3 * 2 + 2 * 4
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    files = [folder / "round-1" / "explored" / "own" for folder in (tmp_path / "run", finished)]
    assert len({(folder / "episodes.jsonl").read_text().partition('"by"')[0] for folder in files}) == 1
    assert [path.name for path in files[0].iterdir()] == ["episodes.jsonl"]


CLOSED = """
import pathlib


def make(task):
    if task["prompt"][0]["content"] == "task 15" and pathlib.Path({sign!r}).exists():
        raise ConnectionError("the shop is closed")
    return Talk(task)
"""


def test_a_failing_environment_loses_nothing_that_was_played(tmp_path):
    recipe, sign = recipe_in(tmp_path), tmp_path / "closed"
    (tmp_path / "my_env.py").write_text(ENVIRONMENT + CLOSED.format(sign=str(sign)))
    load_plugin(tmp_path / "my_env.py")
    sign.touch()
    with pytest.raises(UserError, match=r"environment my_env\.py:make, task .*train\.jsonl:16: beginning: ConnectionE"):
        run_plan(make_plan(recipe)[:2])
    folder = tmp_path / "run" / "round-0" / "explored" / "own"
    kept = [path.read_text() for path in sorted(folder.glob("_*.jsonl"))]
    assert len(kept) == 3
    sign.unlink()
    run_plan(make_plan(recipe)[:2])
    whole = (folder / "episodes.jsonl").read_text()
    assert whole.startswith("".join(kept)) and len(whole.splitlines()) == 16


def all_tied(recipe, part: str):
    """The plan, with its first episodes of this part rewritten: each earned what the expert did."""
    plan = make_plan(recipe)
    run_plan(plan[:2])
    file = plan[1].folder / part / "episodes.jsonl"
    lines = [{**line, "ended": "over", "reward": 0.5} for line in rows_of(file)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan


def test_held_out_tasks_without_a_pair_leave_their_round_unevaluated(tmp_path, capsys):
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "eval_loss"}
    plan = all_tied(recipe_in(tmp_path, eval_strategy="epoch", save_strategy="epoch", **best), "held_out")
    run_plan(plan)
    said = capsys.readouterr().out
    assert "no held-out pair could be made: on every task the model earns what the expert does" in said
    assert said.count("there are no held-out rows, so this stage is not evaluated") == 1
    results = [json.loads((plan[place].folder / "results.json").read_text()) for place in (3, 6)]
    assert results[0]["eval"] == {} and "eval_loss" in results[1]["eval"]
    assert json.loads((plan[2].folder / "figures.json").read_text())["held_out"] == {"ties": 1.0}
    run_plan(plan)
    assert capsys.readouterr().out.count("done before") == len(plan)


def test_ties_on_every_task_end_the_rounds_and_name_the_model_that_is_left(tmp_path):
    plan = all_tied(recipe_in(tmp_path), "own")
    with pytest.raises(UserError, match=rf"nothing left to learn\. .*result is the model in {tmp_path}/tiny"):
        run_plan(plan)


def test_an_edited_environment_is_another_one(tmp_path):
    recipe = recipe_in(tmp_path)
    run_plan(make_plan(recipe)[:2])
    (tmp_path / "my_env.py").write_text(ENVIRONMENT.replace("% 5", "% 4"))
    load_plugin(tmp_path / "my_env.py")
    with pytest.raises(UserError, match="file: "):
        run_plan(make_plan(recipe)[:2])


@pytest.mark.slow
def test_episodes_are_the_same_for_two_ranks(finished, tmp_path):
    run_plan(make_plan(recipe_in(tmp_path))[:1])
    block = " ".join(BLOCK.format(environment="{function: my_env.py:make}", more="").split())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "prefopt"]
    options = ["--plugin", "my_env.py", "--procedure", block, "--loss", "{name: eto}", "--stage", "explore-0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "train", "recipe.yaml", *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("own", "held_out"):
        ours, theirs = (
            [{**line, "by": ""} for line in rows_of(folder / "round-0" / "explored" / part / "episodes.jsonl")]
            for folder in (tmp_path / "run", finished)
        )
        assert ours == theirs


def test_the_social_world_is_an_environment():
    sessions = expert_sessions(30, 0)
    for session in sessions:
        again = type(session).of_task(session.task)
        answers = [again.step(session.said(turn)) for turn in range(6)]
        assert again.messages == session.messages
        assert answers == [*session.messages[2::2], None]
        assert again.reward == session.reward
    assert 0.1 < sum(session.reward for session in sessions) / 30 < 0.7
    half = type(sessions[0]).of_task(sessions[0].task)
    half.step("hello")
    assert half.reward == 0
