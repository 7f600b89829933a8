"""Episodes: what an environment hears, how they end, what they depend on, and environments that fail."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest

from prefopt.data.formats import Example
from prefopt.data.problems import Where
from prefopt.environments import check_environment, environment_facts, open_environment, playing
from prefopt.environments.playing import play
from prefopt.errors import RecipeError, UserError
from prefopt.generation import Generation, Sampling
from prefopt.losses import load_plugin
from tests.helpers import make_model, make_tokenizer


class Counting:
    """An episode of as many turns as the task says, which rewards what it hears by its length."""

    def __init__(self, task):
        self.task, self.heard, self.reward = task, [], 0.0

    def step(self, text):
        self.heard.append(text)
        self.reward += len(text)
        return None if len(self.heard) == self.task["turns"] else f"turn {len(self.heard)}"


def task(number: int, turns: int = 3, **columns) -> Example:
    prompt = [{"role": "user", "content": f"task {number % 2}"}]
    return Example("", prompt, columns={"turns": turns, **columns}, where=Where("tasks.jsonl", number, number + 1))


def scripted(monkeypatch, say):
    """Let `say(history, draw)` speak for the model: a text, or one that is cut off when it is a list."""
    told = []

    def encode(tokenizer, prompts, kwargs):
        told[:] = [example.prompt for example in prompts]
        return [list(range(len(example.prompt))) for example in prompts]

    def sample(model, tokenizer, draws, sampling, batch_size):
        answers = []
        for draw in draws:
            said = say(told[draw.prompt_index], draw)
            finished = isinstance(said, str)
            answers.append(Generation(draw.prompt_index, said if finished else said[0], [], finished))
        return answers

    monkeypatch.setattr(playing, "encode_prompts", encode)
    monkeypatch.setattr(playing, "sample", sample)


def played(tasks, environment=Counting, max_turns=9, room=99):
    model = make_model(max_position_embeddings=room + 12)
    sampling = Sampling(max_new_tokens=12, seed=5)
    return play(environment, tasks, model, None, sampling, max_turns=max_turns, batch_size=4, name="e.py:make")


def test_an_episode_is_what_was_said_in_turn_and_what_it_earned(monkeypatch):
    scripted(monkeypatch, lambda history, draw: f"{len(history)} heard")
    one, two = played({4: task(4, turns=2), 9: task(9, turns=1)})
    assert [(each["role"], each["content"]) for each in one.messages] == [
        ("assistant", "1 heard"), ("user", "turn 1"), ("assistant", "3 heard"),
    ]  # fmt: skip
    assert (one.number, one.ended, one.turns, one.reward) == (4, "over", 2, 14.0)
    assert (two.number, two.ended, two.turns, two.reward) == (9, "over", 1, 7.0)


@pytest.mark.parametrize(
    ("say", "options", "ended", "turns"),
    [
        (lambda history, draw: "yes", {"max_turns": 2}, "turn_limit", 2),
        (lambda history, draw: ["yes and"] if len(history) > 1 else "yes", {}, "cut_off", 1),
        (lambda history, draw: " \n" if len(history) > 3 else "yes", {}, "no_text", 2),
        (lambda history, draw: "a\x00b", {}, "no_text", 0),
        (lambda history, draw: "yes", {"room": 3}, "no_room", 2),
    ],
)
def test_an_episode_ends_where_no_turn_can_follow(monkeypatch, say, options, ended, turns):
    """And a last word of the environment that nobody answers is not part of it where the limit ends it."""
    scripted(monkeypatch, say)
    (one,) = played({0: task(0, turns=5)}, **options)
    assert (one.ended, one.turns, one.reward) == (ended, turns, 3.0 * turns)
    assert ended != "turn_limit" or one.messages[-1]["role"] == "assistant"


def test_an_environment_may_speak_in_messages_and_does_not_change_the_task(monkeypatch):
    class Tool(Counting):
        def step(self, text):
            self.task["prompt"].clear()
            answer = super().step(text)
            return answer and {"role": "tool", "content": answer, "name": "clock"}

    scripted(monkeypatch, lambda history, draw: f"{history[0]['content']} {len(history)}")
    (one,) = played({0: task(0, turns=2)}, Tool)
    assert one.messages[1] == {"role": "tool", "content": "turn 1", "name": "clock"}
    assert one.messages[2]["content"] == "task 0 3"


class Holding(Counting):
    """Counts how many episodes hold something, and keeps the most there were at a time."""

    open, most, closed = 0, 0, 0

    def __init__(self, task):
        super().__init__(task)
        Holding.open += 1
        Holding.most = max(Holding.most, Holding.open)

    def step(self, text):
        if self.task.get("broken"):
            raise ConnectionError("gone")
        return super().step(text)

    def close(self):
        Holding.open -= 1
        Holding.closed += 1
        if self.task.get("stuck"):
            raise OSError("it does not close")


@pytest.fixture
def holding(monkeypatch):
    for name in ("open", "most", "closed"):
        monkeypatch.setattr(Holding, name, 0)


def test_as_many_episodes_as_a_batch_has_turns_are_open_at_a_time_and_each_is_closed_once(monkeypatch, holding):
    scripted(monkeypatch, lambda history, draw: "yes")
    episodes = played({number: task(number, turns=1 + number % 3) for number in range(11)}, Holding)
    assert [each.number for each in episodes] == list(range(11))
    assert [each.turns for each in episodes] == [1 + number % 3 for number in range(11)]
    assert (Holding.most, Holding.open, Holding.closed) == (4, 0, 11)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"broken": True}, "turn 1: ConnectionError: gone"),
        ({"broken": True, "stuck": True}, "turn 1: ConnectionError: gone"),
        ({"stuck": True, "turns": 1}, "close: OSError: it does not close"),
    ],
)
def test_episodes_are_closed_when_one_of_them_fails(monkeypatch, holding, change, said):
    scripted(monkeypatch, lambda history, draw: "yes")
    with pytest.raises(UserError, match=said):
        played({0: task(0, turns=1), 1: task(1, **change), 2: task(2)}, Holding)
    assert (Holding.open, Holding.closed) == (0, 3)


def test_an_environment_reads_the_tools_and_template_arguments_of_a_task(monkeypatch):
    scripted(monkeypatch, lambda history, draw: "yes")
    told = []

    def environment(row):
        told.append(row)
        return Counting(row)

    tools = [{"name": "clock"}]
    played({0: replace(task(0), tools=tools, chat_template_kwargs={"thinking": False}), 1: task(1)}, environment)
    assert (told[0]["tools"], told[0]["chat_template_kwargs"]) == (tools, {"thinking": False})
    assert told[1].keys() == {"turns", "prompt"}


def test_what_is_sampled_follows_from_the_task_and_what_was_said():
    """Whoever plays the other tasks, in whatever order: with weights this small no two batches round differently."""
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    # Turns end often, and before what no conversation may hold.
    ends = [token for token, text in enumerate(texts) if token % 6 == 2 or not text.isprintable()]
    model.generation_config.eos_token_id = ends

    def run(numbers, seed=5):
        tasks, sampling = {number: task(number) for number in numbers}, Sampling(max_new_tokens=12, seed=seed)
        episodes = play(Counting, tasks, model, tokenizer, sampling, max_turns=3, batch_size=3, name="e.py:make")
        return {each.number: (each.messages, each.ended, each.reward) for each in episodes}

    together = run(range(12))
    assert together == {**run([7, 1, 2]), **run([0, 3, 11]), **run([10, 9, 4, 5, 6, 8])}
    assert {"over", "no_text"} <= {ended for _, ended, _ in together.values()}
    assert together[0] != together[2]  # of the same words, by its number
    assert run(range(12), seed=6) != together


def rewarding(value):
    """What makes an environment end at once with this reward."""
    return {"step": lambda self, text: None, "reward": property(lambda self: value, lambda self, ignored: None)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"__init__": lambda self, task: 1 / 0}, "beginning: ZeroDivisionError: division by zero"),
        ({"step": None}, "gives Broken, which has no `step`"),
        ({"step": lambda self, text: self.lost}, "turn 1: AttributeError: 'Broken' object has no attribute 'lost'"),
        ({"step": lambda self, text: 7}, "turn 1: step gives 7: message 0 is a number, not an object"),
        ({"step": lambda self, text: {"role": "user"}}, 'turn 1: step gives {"role": "user"}: message 0'),
        ({"step": lambda self, text: {"role": "assistant", "content": "I"}}, "turn 1: step speaks as the assistant"),
        (rewarding("high"), "reward: ValueError: could not convert string to float: 'high'"),
        (rewarding(None), "reward: TypeError"),
        (rewarding(float("nan")), "the reward is nan; it must be a number"),
    ],
)
def test_an_environment_that_fails_is_named_with_the_task_and_what_it_did(monkeypatch, change, said):
    scripted(monkeypatch, lambda history, draw: "yes")
    broken = type("Broken", (Counting,), change)

    def environment(row):
        return broken(row) if row["turns"] == 1 else Counting(row)

    with pytest.raises(UserError, match=re.escape(f"environment e.py:make, task tasks.jsonl:7: {said}")):
        played({0: task(0), 6: task(6, turns=1)}, environment)


@pytest.mark.parametrize(
    "block", [None, {}, "my_env.py:make", {"functoin": "a"}, {"function": "a", "social_world": {}}]
)
def test_a_block_that_names_no_environment_is_refused(block):
    with pytest.raises(RecipeError, match=r"procedure\.environment: must be \{function: my_env\.py:make\}"):
        check_environment(block)


def test_a_recipe_alone_never_imports_an_environment(tmp_path):
    file = tmp_path / "my_shop.py"
    file.write_text("class Shop:\n    reward = 1\n\n\ndef make(task):\n    return Shop()\n")
    with pytest.raises(UserError, match=r"a recipe alone never imports code. Add --plugin my_shop\.py"):
        open_environment({"function": "my_shop.py:make"})
    assert load_plugin(file) == []
    assert open_environment({"function": "my_shop.py:make"})({}).reward == 1
    with pytest.raises(UserError, match="has no function `begin`"):
        open_environment({"function": "my_shop.py:begin"})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("class Shop:\n    def __init__(self, task):\n        self.reward = task['price']\n", "Shop"),
        (
            "import functools\n\n\nclass _Shop:\n    reward = 3\n\n\n"
            "@functools.lru_cache\ndef make(task):\n    return _Shop()\n",
            "make",
        ),
        (
            "class _Maker:\n    def __call__(self, task):\n        self.reward = 3\n        return self\n\n\n"
            "make = _Maker()\n",
            "make",
        ),
    ],
)
def test_whatever_can_be_called_with_a_task_is_an_environment(tmp_path, text, name):
    class Task(dict):
        __hash__ = object.__hash__

    file = tmp_path / "shops.py"
    file.write_text(text)
    assert load_plugin(file) == []
    block = {"function": f"shops.py:{name}"}
    assert open_environment(block)(Task(price=3)).reward == 3
    assert environment_facts(block)["file"] == hashlib.sha256(file.read_bytes()).hexdigest()
