"""The steps of the small world on disk, with a model that knows the openings' letters and nothing else."""

from __future__ import annotations

import json

import pytest

from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.errors import UserError
from prefopt.scratch import build_model, train_tokenizer
from prefopt.world import stages
from prefopt.world.grammar import is_grammatical
from prefopt.world.stages import (
    WorldSettings,
    compare,
    comparison_text,
    held_out_prompts,
    make_pairs,
    make_texts,
    training_prompts,
)

SETTINGS = WorldSettings(texts=40, prompts=8, eval_prompts=6, eval_pair_prompts=4, max_new_tokens=12)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_model(folder, seed):
    """A model with random weights whose answers end at once or late, and its tokenizer."""
    tokenizer = train_tokenizer(training_prompts()[:20], 300)
    model = build_model(LLAMA, tokenizer, seed)
    model.generation_config.eos_token_id = list(range(2, 60))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def by_length(monkeypatch):
    """A reward that random answers differ in."""
    monkeypatch.setattr(stages, "reward", lambda prompt, answer: float(len(answer)))


def test_openings_for_evaluation_are_never_trained_on():
    assert not set(training_prompts()) & set(held_out_prompts())
    assert len(held_out_prompts()) == 512


def test_texts_are_rows_the_loader_reads_and_follow_the_seed(tmp_path):
    path = make_texts(tmp_path, SETTINGS)
    first = path.read_bytes()
    loaded = load_examples(DataSpec(data_files=str(path)))
    assert len(loaded.examples) == SETTINGS.texts
    assert all(example.desirable and example.prompt in training_prompts() for example in loaded.examples)
    assert make_texts(tmp_path, SETTINGS).read_bytes() == first
    assert make_texts(tmp_path, WorldSettings(texts=40, seed=1)).read_bytes() != first


def test_held_out_reviews_are_of_openings_that_no_text_has(tmp_path):
    make_texts(tmp_path, SETTINGS)
    rows = rows_of(tmp_path / stages.HELD_OUT_TEXTS)
    assert [row["prompt"] for row in rows] == held_out_prompts()[: SETTINGS.eval_prompts]
    assert all(is_grammatical(row["prompt"], row["completion"]) for row in rows)


@pytest.mark.usefixtures("by_length")
def test_pairs_are_rows_the_loader_reads_in_the_order_of_the_reward(tmp_path):
    counts = make_pairs(save_model(tmp_path / "base", 0), tmp_path, SETTINGS)
    rows, held_out = rows_of(tmp_path / stages.PAIRS), rows_of(tmp_path / stages.EVAL_PAIRS)
    assert len(load_examples(DataSpec(data_files=str(tmp_path / stages.PAIRS))).examples) == len(rows) > 0
    assert counts["pairs"] == len(rows)
    assert counts["eval_pairs"] == len(held_out)
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows + held_out)
    assert {row["prompt"] for row in rows} <= set(training_prompts())
    assert {row["prompt"] for row in held_out} <= set(held_out_prompts())


@pytest.mark.usefixtures("by_length")
def test_comparison_of_a_model_with_itself_shows_no_change(tmp_path):
    base = save_model(tmp_path / "base", 0)
    result = compare(base, base, tmp_path, SETTINGS)
    assert result["reward_gain"] == 0
    assert result["after"] == result["before"]
    assert result["after"]["kl"] == pytest.approx(0, abs=1e-5)
    assert json.loads((tmp_path / stages.COMPARISON).read_text()) == result


@pytest.mark.usefixtures("by_length")
def test_comparison_shows_gain_and_kl_of_another_model(tmp_path):
    result = compare(save_model(tmp_path / "base", 0), save_model(tmp_path / "policy", 1), tmp_path, SETTINGS)
    before, after = result["before"], result["after"]
    assert result["reward_gain"] == pytest.approx(after["reward"] - before["reward"])
    assert after["kl"] > 1e-3
    assert {sample["prompt"] for sample in after["samples"]} == set(held_out_prompts()[:6])


def test_text_of_a_comparison_shows_figures_and_answers_side_by_side():
    def side(reward, kl, answer):
        figures = {"reward": reward, "reward_se": 0.05, "kl": kl, "length": 30.0, "finished": 1.0, "valid": 0.9}
        sample = {"prompt": "Review of the film The Quiet Harbor:", "answer": answer, "reward": reward}
        return {**figures, "samples": [sample] * 5}

    result = {
        "before": side(-0.01, 0.0, " The plot was dull."),
        "after": side(1.23, 2.5, " The plot was superb."),
        "reward_gain": 1.24,
        "reward_gain_se": 0.07,
    }
    text = comparison_text(result, samples=2)
    assert text.count("Review of the film") == 2
    for shown in ("-0.01", "+1.23", "2.50", "+1.24 +- 0.07", "90%"):
        assert shown in text
    assert text.index("The plot was dull.") < text.index("The plot was superb.")
    assert max(len(line) for line in text.splitlines()) <= 96


@pytest.mark.parametrize("change", [{"prompts": 5000}, {"eval_prompts": 513}, {"eval_pair_prompts": 0}])
def test_more_openings_than_there_are_is_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        WorldSettings(**change)
