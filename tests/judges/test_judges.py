"""Judges of every kind: what they are asked, what they say, and how they fail."""

from __future__ import annotations

import random
import re
import sys
from urllib.parse import urlsplit

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from prefopt.errors import RecipeError, UserError
from prefopt.judges import check_judge, judge_facts, open_judge
from prefopt.judges.command import CONSENT
from prefopt.judges.endpoint import HOST, KEY
from prefopt.losses import load_plugin
from prefopt.world.grammar import write_review
from prefopt.world.reward import reward
from prefopt.world.stages import held_out_prompts
from tests.helpers import make_tokenizer
from tests.judges.server import Endpoint

ANSWERS = [" a cat", " a", " a cat sat on a mat"]
COMMAND = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"scores": [len(answer) for answer in asked["answers"]]}), flush=True)
"""


def longer(question: str) -> str:
    """A judge that likes the longer answer."""
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nReply", question, re.DOTALL).groups()
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "T"


@pytest.fixture
def endpoint():
    server = Endpoint(longer)
    yield server
    server.close()


def judge_at(endpoint: Endpoint, **settings):
    judge = open_judge({"endpoint": endpoint.url, "model": "m", **settings})
    judge._wait = 0.001
    return judge


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (None, "procedure.judge: is missing"),
        ({}, "needs one of function, command, reward_model, endpoint, world, and has 0"),
        ({"function": "a:b", "command": "x"}, "has 2"),
        ({"endpoint": "http://x", "modle": "m"}, "Did you mean `model`"),
        ({"endpoint": "http://x"}, "procedure.judge.model: is missing"),
        ({"world": "kindness"}, "procedure.judge.world: `kindness` is no figure of the small world. It has reward, gr"),
    ],
)
def test_blocks_that_are_no_judge_are_refused(block, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_judge(block)


def test_a_function_of_a_plugin_that_was_named(tmp_path):
    file = tmp_path / "rules_of_mine.py"
    file.write_text("def length(prompt, answer):\n    return len(answer)\n")
    with pytest.raises(UserError, match=r"a recipe alone never imports code. Add --plugin rules_of_mine\.py"):
        open_judge({"function": "rules_of_mine.py:length"})
    assert load_plugin(file) == []
    assert open_judge({"function": "rules_of_mine.py:length"}).scores("p", ANSWERS) == [6, 2, 19]
    with pytest.raises(UserError, match="has no function `width`"):
        open_judge({"function": "rules_of_mine.py:width"})


@pytest.mark.parametrize("body", ["return None", "return float('nan')", "raise KeyError('x')"])
def test_a_function_that_gives_no_number_is_named(tmp_path, body):
    file = tmp_path / f"bad_{abs(hash(body))}.py"
    file.write_text(f"def score(prompt, answer):\n    {body}\n")
    load_plugin(file)
    with pytest.raises(UserError, match=rf"judge {file.name}:score: "):
        open_judge({"function": f"{file.name}:score"}).scores("p", ANSWERS)


def test_a_loss_that_was_not_registered_is_still_a_mistake(tmp_path):
    file = tmp_path / "forgot.py"
    file.write_text("from prefopt.losses import Loss\nclass MyLoss(Loss):\n    pass\ndef helper():\n    pass\n")
    with pytest.raises(UserError, match="registers no loss"):
        load_plugin(file)


def test_a_command_is_asked_line_by_line_and_only_with_consent(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(COMMAND)
    block = {"command": [sys.executable, str(tmp_path / "judge.py")]}
    with pytest.raises(UserError, match=f"set {CONSENT}=1"):
        open_judge(block)
    monkeypatch.setenv(CONSENT, "1")
    judge = open_judge(block)
    assert [judge.scores("p", ANSWERS), judge.scores([{"role": "user", "content": "p"}], ["b"])] == [[6, 2, 19], [1]]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('hello')", "wrote 'hello"),
        ("print('{\"scores\": [1]}')", r"wrote \[1.0\] for 3 answers"),
        ("print('{\"scores\": [1, 2, NaN]}')", "for 3 answers"),
        (r"import sys; sys.stdout.buffer.write(b'\xff\n')", "wrote a line that is not UTF-8"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("import time; time.sleep(60)", "after 0.5 s without a line"),
    ],
)
def test_a_command_that_fails_is_told(program, said, monkeypatch):
    monkeypatch.setenv(CONSENT, "1")
    with pytest.raises(UserError, match=said):
        open_judge({"command": [sys.executable, "-c", program], "seconds": 0.5}).scores("p", ANSWERS)


def test_a_command_that_is_not_there(monkeypatch):
    monkeypatch.setenv(CONSENT, "1")
    with pytest.raises(UserError, match="does not start"):
        open_judge({"command": ["no-such-program-anywhere"]})


def reward_model(folder, labels: int = 1):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=len(tokenizer),
        num_labels=labels, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("prompt", ["the cat", [{"role": "user", "content": "the cat"}]])
def test_a_reward_models_scores_are_its_own_whatever_the_batch(tmp_path, prompt):
    name = reward_model(tmp_path)
    together = open_judge({"reward_model": name, "dtype": "float32"}).scores(prompt, ANSWERS)
    alone = open_judge({"reward_model": name, "dtype": "float32", "batch_size": 1}).scores(prompt, ANSWERS)
    assert together == pytest.approx(alone, abs=1e-5)
    tokenizer, model = make_tokenizer(), LlamaForSequenceClassification.from_pretrained(name)
    text = prompt + ANSWERS[0] if isinstance(prompt, str) else f"<s><|user|>the cat<|assistant|>{ANSWERS[0]}</s>"
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=isinstance(prompt, str))).logits
    assert together[0] == pytest.approx(float(logits), abs=1e-5)


def test_a_reward_model_that_was_trained_again_is_another_judge(tmp_path):
    block = {"reward_model": reward_model(tmp_path)}
    before = judge_facts(block)
    assert judge_facts(block) == before
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        model.score.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert judge_facts(block) != before


def test_a_reward_model_whose_score_is_no_number_is_told(tmp_path):
    name = reward_model(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(name)
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    model.save_pretrained(name)
    with pytest.raises(UserError, match="gives nan for the answer ' a cat'"):
        open_judge({"reward_model": name, "dtype": "float32"}).scores("p", ANSWERS)


def test_a_classifier_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="has 3 outputs; a reward model has one"):
        open_judge({"reward_model": reward_model(tmp_path, labels=3)})


def test_an_endpoint_compares_every_two_answers_in_both_orders(endpoint, monkeypatch):
    monkeypatch.setenv(KEY, "s3cret")
    monkeypatch.setenv(HOST, urlsplit(endpoint.url).netloc)
    judge = judge_at(endpoint, prices=[1.0, 10.0], criterion="The longer one wins.")
    assert judge.scores("p", ANSWERS) == [0.5, 0.0, 1.0]
    assert len(endpoint.requests) == 6
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}
    assert all("The longer one wins." in request["messages"][0]["content"] for request in endpoint.requests)
    assert endpoint.keys == {"Bearer s3cret"}
    assert judge.summary == "6 calls (0 again), 600 tokens in, 12 out, 0.0007 dollars"


def test_a_judge_that_likes_the_first_place_prefers_nobody(endpoint):
    endpoint.verdict = lambda question: "A"
    assert judge_at(endpoint).scores("p", ANSWERS) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("host", [None, "127.0.0.1", "api.example.com"])
def test_a_recipe_alone_sends_no_key_to_a_host_of_its_choice(endpoint, monkeypatch, host):
    monkeypatch.setenv(KEY, "s3cret")
    monkeypatch.setenv(HOST, host) if host else monkeypatch.delenv(HOST, raising=False)
    with pytest.raises(UserError, match=f"set {HOST}={urlsplit(endpoint.url).netloc}"):
        judge_at(endpoint)
    with pytest.raises(RecipeError, match="key_variable: not read"):
        judge_at(endpoint, key_variable="HOME")


def test_without_a_key_none_is_sent(endpoint, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    judge_at(endpoint).scores("p", ANSWERS[:2])
    assert endpoint.keys == {None}


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_is_refused(endpoint, status):
    other = Endpoint(longer)
    endpoint.faults, endpoint.location = [status] * 2, f"{other.url}/elsewhere"
    with pytest.raises(UserError, match=r"redirects to .*elsewhere"):
        judge_at(endpoint, workers=1).scores("p", ANSWERS[:2])
    other.close()
    assert not other.requests


@pytest.mark.parametrize(
    ("reply", "value", "clear"),
    [
        ("A", 1.0, True),
        ("Answer B.", 0.0, True),
        ("B, since B is kinder", 0.0, True),
        ("T", 0.5, True),
        ("Tie", 0.5, True),
        ("A tie.", 0.5, True),
        ("A and B are tied", 0.5, True),
        ("A is worse than B", 0.5, False),
        ("I cannot say", 0.5, False),
    ],
)
def test_a_verdict_is_one_letter_or_a_tie(endpoint, reply, value, clear):
    endpoint.verdict = lambda question: reply
    judge = judge_at(endpoint)
    assert judge._compare("p", *ANSWERS[:2]) == value
    assert ("1 replies without a verdict" in judge.summary) is not clear


def test_an_answer_that_breaks_off_is_asked_for_again(endpoint):
    endpoint.faults = [0]
    judge = judge_at(endpoint, workers=1)
    assert judge.scores("p", ANSWERS[:2]) == [1.0, 0.0]
    assert judge.summary.startswith("3 calls (1 again)")


def test_an_endpoint_is_asked_again_when_it_is_busy(endpoint):
    endpoint.faults = [429, 503, 500]
    judge = judge_at(endpoint, workers=1)
    assert judge.scores("p", ANSWERS[:2]) == [1.0, 0.0]
    assert judge.summary.startswith("5 calls (3 again)")


@pytest.mark.parametrize(
    ("faults", "settings", "said"),
    [([401] * 9, {}, "refuses with status 401"), ([503] * 9, {"retries": 2}, "no answer after 3 calls.*status 503")],
)
def test_an_endpoint_that_stays_away_is_told(endpoint, faults, settings, said):
    endpoint.faults = faults
    with pytest.raises(UserError, match=said):
        judge_at(endpoint, workers=1, **settings).scores("p", ANSWERS[:2])


def test_an_endpoint_is_an_address():
    with pytest.raises(UserError, match="is no address"):
        open_judge({"endpoint": "localhost", "model": "m"})


def test_the_small_world_judges_by_its_reward_and_its_grammar():
    prompt = held_out_prompts()[0]
    review = write_review(prompt, random.Random(0))
    answers = [review, review + " and"]
    assert open_judge({"world": "reward"}).scores(prompt, answers) == [reward(prompt, answer) for answer in answers]
    assert open_judge({"world": "grammatical"}).scores(prompt, answers) == [1.0, 0.0]
    whole, part = open_judge({"world": "sentences"}).scores(prompt, answers)
    assert whole == 1.0 > part > 0.0


@pytest.mark.parametrize("prompt", ["a cat", [{"role": "user", "content": "a cat"}]])
def test_the_grammar_judges_answers_to_its_own_openings_alone(prompt):
    with pytest.raises(UserError, match="judges answers to the openings of its own `world`"):
        open_judge({"world": "grammatical"}).scores(prompt, [" sat"])
