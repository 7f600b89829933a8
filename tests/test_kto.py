"""KTO in training: one divergence for the whole step, however its rows are split, from answers to other prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefopt.data.mismatch import single_answers, with_mismatched
from prefopt.errors import DataError, RecipeError
from prefopt.losses import make
from tests.helpers import make_model, make_tokenizer, text_pairs
from tests.training import make_trainer, weights


def answers(n, seed=0, *, good=lambda index: index % 2 == 0):
    """Single answers with labels."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": good(index)}
        for index, row in enumerate(text_pairs(n, seed))
    ]


def moved_trainer(folder, rows, **settings):
    """A policy far from its reference, so that z0 is well above 0."""
    tokenizer = make_tokenizer()
    policy = make_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return make_trainer(
        folder, rows, loss="kto", model=policy, reference=make_model(vocab_size=len(tokenizer)), **settings
    )


SPLITS = [(10, 1), (4, 3), (3, 4), (1, 10)]


@pytest.mark.parametrize("rows", [answers(10), text_pairs(5), answers(10, good=lambda index: True)])
def test_any_split_gives_the_same_step(tmp_path, rows):
    found, logged = [], []
    for batch, accumulation in SPLITS:
        trainer = moved_trainer(
            tmp_path, rows, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        found.append(weights(trainer.model))
        logged.append(next(line["kl"] for line in trainer.state.log_history if "kl" in line))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
    assert logged == pytest.approx([logged[0]] * len(SPLITS), abs=1e-4)


def test_the_divergence_is_the_mean_over_all_mismatched_answers_of_the_step(tmp_path):
    trainer = moved_trainer(tmp_path, answers(7), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    batch = trainer.data_collator(list(trainer.train_dataset.rows))["mismatched"]
    expected = trainer.score(trainer.model, batch).log_ratio().mean().item()
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(max(0.0, expected), abs=1e-5)


def test_evaluation_does_not_depend_on_its_batch(tmp_path):
    figures = [
        moved_trainer(tmp_path, answers(4), eval_rows=answers(5, 3), per_device_eval_batch_size=batch).evaluate()
        for batch in (1, 2, 4, 5)
    ]
    for name in ("eval_loss", "eval_kl", "eval_rewards/chosen", "eval_rewards/rejected"):
        assert [one[name] for one in figures] == pytest.approx([figures[0][name]] * 4, abs=1e-5), name


def test_mismatched_answers_are_scored_once_and_found(tmp_path):
    block = {"source": "cached", "store": str(tmp_path / "store")}
    first = make_trainer(tmp_path / "a", answers(9), loss="kto", reference=False, reference_block=block)
    assert first.reference.account.scored == 18
    assert make_trainer(
        tmp_path / "b", answers(9), loss=make("kto", beta=0.3), reference=False, reference_block=block
    ).reference.account.scored == 0  # fmt: skip
    without = make("kto", z0="zero")
    trainer = make_trainer(tmp_path / "c", answers(9), loss=without, reference=False, reference_block=block)
    assert trainer.reference.account.answers == 9 and "mismatched" not in trainer.data_collator(
        list(trainer.train_dataset.rows)
    )


def test_pairs_become_single_answers_and_say_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path, text_pairs(5), loss="kto")
    assert "train: 5 pairs are read as 10 single answers" in capsys.readouterr().out
    assert [row["desirable"] for row in trainer.train_dataset.rows] == [True, False] * 5


def test_labelled_rows_are_refused_by_a_loss_of_pairs(tmp_path):
    with pytest.raises(DataError, match=r"labelled answer.* such as kto or sft"):
        make_trainer(tmp_path, answers(4), loss="dpo")


def test_a_loss_asked_for_by_hand_takes_its_estimates_over_that_batch(tmp_path):
    trainer = make_trainer(tmp_path, text_pairs(5), loss="kto", per_device_train_batch_size=10)
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.compute_loss(trainer.model, batch).item()
    trainer.train()
    assert found == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


def test_a_mixture_with_pairs_is_refused():
    from prefopt.losses import Objective

    with pytest.raises(RecipeError, match="train them apart"):
        Objective.of(["kto", "dpo"])


# ---- partners -------------------------------------------------------------------------------------------------------


def dataset(rows):
    from prefopt.config import PreferenceConfig
    from prefopt.data.prepare import Preparation

    args = PreferenceConfig(output_dir="unused", use_cpu=True)
    return single_answers(Preparation(make_tokenizer(), args, say=lambda *lines: None).one(rows, "train"))


def key(row, side):
    return row["prompt_ids"].tobytes(), row[f"{side}_ids"].tobytes()


@pytest.mark.parametrize("n", range(2, 14))
def test_no_answer_stands_behind_its_own_prompt(n):
    data, left = with_mismatched(dataset(answers(n)), 3, None)
    assert not left
    for row in data.rows:
        own = {
            other["completion_ids"].tobytes()
            for other in data.rows
            if other["prompt_ids"].tobytes() == row["prompt_ids"].tobytes()
        }
        assert row["mismatched_ids"].tobytes() not in own


def test_duplicated_prompts_are_never_matched_with_themselves():
    """Both answers of a pair, and prompts that stand several times."""
    rows = [{**row, "prompt": f"prompt {index % 3}"} for index, row in enumerate(text_pairs(12))]
    data, left = with_mismatched(dataset(rows), 0, None)
    prompts = {}
    for row in data.rows:
        prompts.setdefault(row["completion_ids"].tobytes(), set()).add(row["prompt_ids"].tobytes())
    assert not left
    assert all(row["prompt_ids"].tobytes() not in prompts[row["mismatched_ids"].tobytes()] for row in data.rows)


def test_one_prompt_alone_is_counted():
    rows = [{**row, "prompt": "the same"} for row in text_pairs(3)]
    data, left = with_mismatched(dataset(rows), 0, None)
    assert left == len(data) == 6


def test_partners_follow_from_seed_and_contents_alone():
    rows = answers(11)
    first = with_mismatched(dataset(rows), 5, None)[0]
    again = with_mismatched(dataset(rows[::-1]), 5, None)[0]
    other = with_mismatched(dataset(rows), 6, None)[0]
    partner = {key(row, "completion"): row["mismatched_ids"].tolist() for row in first.rows}
    assert {key(row, "completion"): row["mismatched_ids"].tolist() for row in again.rows} == partner
    assert {key(row, "completion"): row["mismatched_ids"].tolist() for row in other.rows} != partner


def test_a_partner_is_cut_at_the_limit():
    data, _ = with_mismatched(dataset(answers(9)), 0, 10)
    for row in data.rows:
        assert len(row["prompt_ids"]) + len(row["mismatched_ids"]) <= max(10, len(row["prompt_ids"]) + 1)
        assert len(row["mismatched_ids"]) == len(row["mismatched_scored"]) >= 1
        assert isinstance(row["mismatched_ids"], np.ndarray)


def test_one_prompt_among_many_rows_costs_no_more():
    rows = [{**row, "prompt": "the same" if index else "another"} for index, row in enumerate(text_pairs(300))]
    data, left = with_mismatched(dataset(rows), 0, None)
    assert not left
    alone = {row["completion_ids"].tobytes() for row in data.rows if row["prompt_ids"].tobytes() != prompt_of(data)}
    usual = [row for row in data.rows if row["prompt_ids"].tobytes() == prompt_of(data)]
    assert all(row["mismatched_ids"].tobytes() in alone for row in usual)


def prompt_of(data):
    """The prompt that most rows have."""
    return data.rows[-1]["prompt_ids"].tobytes()
