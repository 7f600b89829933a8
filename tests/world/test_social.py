"""The social world: what decides a sale, what an expert says, and the pairs a model's failures make."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from prefopt.data import DataSpec, load_examples
from prefopt.data.segments import selector_of
from prefopt.errors import UserError
from prefopt.generation import Generation
from prefopt.scratch import build_model, train_tokenizer
from prefopt.world import social, social_figures, social_stages
from prefopt.world.social import ACTS, ANSWERS, KEY, TURNS, Session, expert, expert_sessions, session_pairs
from prefopt.world.social_stages import SocialSettings
from tests.world.test_stages import LLAMA, rows_of

SETTINGS = SocialSettings(sessions=30, pairs=12, eval_pairs=4, tries=2, partners=6)


def speaking(session: Session, *, first: bool = True, second: bool = True) -> Session:
    """The session to its end, with the acts that are wanted or others."""
    while session.turn < TURNS:
        right = {KEY: first, KEY + 1: second}.get(session.turn, True)
        session.agent_speaks(f"{session.wanted(session.turn) if right else 'nothing'} indeed")
    return session


def test_a_sale_needs_both_acts_and_nothing_else():
    for seed in range(20):

        def drawn(seed=seed):
            return Session.draw(random.Random(seed))

        assert speaking(drawn()).error() is None
        assert speaking(drawn(), first=False).error() == KEY
        assert speaking(drawn(), second=False).error() == KEY + 1
        assert speaking(drawn(), first=False, second=False).reward == 0


def test_the_partner_shows_what_it_wants_before_the_turn_that_decides():
    session = speaking(Session.draw(random.Random(3)))
    heard = [message["content"] for message in session.messages if message["role"] == "user"]
    assert len(heard) == TURNS and heard[KEY].split()[2] == session.mood in ACTS
    assert heard[KEY + 1].split()[-1] == session.reason in ANSWERS


def test_the_expert_takes_the_right_act_as_often_as_its_skill_says():
    sessions = expert_sessions(800, 1)
    share = sum(session.error() != KEY for session in sessions) / 800
    assert share == pytest.approx(social.SKILL, abs=0.06)
    assert [session.messages for session in expert_sessions(3, 1)] == [each.messages for each in sessions[:3]]
    talk = {word for session in sessions for turn in (0, 1, 4, 5) for word in session.said(turn).split()}
    assert talk == set(social.TALK)


@pytest.fixture
def at_random(monkeypatch):
    """An agent that speaks as the expert does, whatever the model is."""

    def generate(model, tokenizer, prompts, *, seed, **options):
        rng = random.Random(seed)
        said = []
        for place, messages in enumerate(prompts):
            turn = sum(message["role"] == "assistant" for message in messages)
            words = messages[2 * KEY]["content"].split() if turn == KEY else ["", "", "angry"]
            reason = messages[-1]["content"].split()[-1] if turn == KEY + 1 else "price"
            session = Session(words[2], reason, ["music"] * TURNS, list(messages))
            said.append(Generation(place, expert(rng, session), [1], finished=True))
        return said

    monkeypatch.setattr(social, "generate", generate)


@pytest.mark.usefixtures("at_random")
def test_pairs_share_what_came_before_the_first_error_and_bound_what_decided():
    rows = session_pairs(None, None, 40, 5)
    assert len(rows) > 20
    for row in rows:
        start, end = row["start_message"], row["end_message"]
        assert row["chosen"][:start] == row["rejected"][:start]
        assert row["chosen"][start] != row["rejected"][start]
        assert start in (2 * KEY + 1, 2 * KEY + 3) and end == 2 * KEY + 3
        assert len(row["chosen"]) == len(row["rejected"]) == 2 * TURNS


@pytest.mark.usefixtures("at_random")
def test_a_conversation_with_a_turn_that_was_cut_off_makes_no_pair(monkeypatch):
    spoken = social.generate

    def cut_off(*rest, **options):
        """Whoever says `today` has not ended."""
        return [replace(each, finished="today" not in each.text) for each in spoken(*rest, **options)]

    whole = session_pairs(None, None, 40, 5)
    monkeypatch.setattr(social, "generate", cut_off)
    rows = session_pairs(None, None, 40, 5)
    assert len(rows) > 3 and "today" in str(whole)
    assert "today" not in str([row[side] for row in rows for side in ("chosen", "rejected")])


@pytest.fixture
def folder(tmp_path):
    """A folder with the conversations, and a model with random weights, saved twice."""
    path = social_stages.make_sessions(tmp_path, SETTINGS)
    texts = [message["content"] for row in rows_of(path) for message in row["completion"]]
    tokenizer = train_tokenizer(texts, 320, chat=True)
    for seed, name in enumerate(("start", "policy")):
        build_model({**LLAMA, "max_position_embeddings": 256}, tokenizer, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.usefixtures("at_random")
def test_files_are_rows_the_loader_reads(folder):
    assert len(load_examples(DataSpec(data_files=str(folder / "sessions.jsonl"))).examples) == SETTINGS.sessions
    counts = social_stages.make_pairs(folder / "start", folder, SETTINGS)
    assert 0 < counts["pairs"] <= 12 and 0 < counts["eval_pairs"] <= 4
    report = social_stages.make_segments(folder, selector_of("fixed:2"))
    assert report.turns == {2: counts["pairs"]}
    rules = {"optional_columns": ("segments", "turn_weights"), "paired": True}
    for name, count in (("segments", counts["pairs"]), ("eval_segments", counts["eval_pairs"])):
        assert len(load_examples(DataSpec(data_files=str(folder / f"{name}.jsonl")), **rules).examples) == count
    # The pairs are whole conversations with bounds, which are read as they are too.
    assert len(load_examples(DataSpec(data_files=str(folder / "pairs.jsonl")), **rules).examples) == counts["pairs"]


@pytest.mark.usefixtures("at_random")
def test_a_model_compared_with_itself_shows_no_change(folder):
    result = social_stages.compare(folder / "start", folder / "start", folder, SETTINGS)
    assert result["before"] == result["after"] and result["gain"] == 0
    assert result["after"]["kl"] == pytest.approx(0, abs=1e-6)
    assert json.loads((folder / "comparison.json").read_text()) == result
    sold = [sample["sold"] for sample in result["before"]["samples"]]
    assert result["before"]["sales"] == pytest.approx(sum(sold) / 6)


@pytest.mark.usefixtures("at_random")
def test_another_model_is_some_way_off_in_every_kind_of_turn(folder, monkeypatch):
    told = list(social_figures.turn_kl(*_models(folder), expert_sessions(3, 0), batch_size=2))
    assert {turn for turn, _ in told} == set(range(TURNS)) and all(kl > 0 for _, kl in told)
    monkeypatch.setattr(social_figures, "turn_kl", lambda *rest: [(0, 1.0), (KEY, 2.0), (KEY + 1, 4.0), (5, 3.0)])
    figures, sessions = social_figures.measure(*_models(folder), 40, 9)
    assert (figures.kl, figures.talk_kl, figures.key_kl) == (2.5, 2.0, 3.0)
    assert figures.language == 1.0 and 2 <= figures.words <= 5
    assert figures.sales_se == pytest.approx((figures.sales * (1 - figures.sales) / 40) ** 0.5)
    assert figures.sales == sum(session.sold for session in sessions) / 40


def _models(folder):
    from prefopt.models import load_model, load_tokenizer

    return load_model(str(folder / "policy")), load_model(str(folder / "start")), load_tokenizer(str(folder / "start"))


def test_text_of_a_comparison_shows_a_conversation_that_was_turned():
    def side(*rewards):
        sessions = [speaking(Session.draw(random.Random(place)), first=sold) for place, sold in enumerate(rewards)]
        figures = dict.fromkeys(("sales", "sales_se", "kl", "talk_kl", "key_kl", "language", "words"), 0.25)
        return {**figures, "samples": [{"messages": each.messages, "sold": each.sold} for each in sessions]}

    text = social_stages.comparison_text({"before": side(1, 0), "after": side(1, 1), "gain": 0.5, "gain_se": 0.1})
    assert "+50.0% +- 10.0%" in text and "before: no sale" in text and "after: a sale" in text
    assert text.count("partner ") == text.count("agent ") == 4
    assert "nothing indeed" in text.partition("after: ")[0] and "nothing" not in text.partition("after: ")[2]


@pytest.mark.parametrize("name", ["sessions", "pairs", "eval_pairs", "tries", "partners"])
def test_sizes_below_one_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"^{name} is 0; it must be at least 1"):
        SocialSettings(**{name: 0})
