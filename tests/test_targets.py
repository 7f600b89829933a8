"""Rows with a target of their own, through the whole trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefopt.errors import DataError
from prefopt.losses import Objective, make
from tests.helpers import make_model, text_pairs
from tests.training import make_trainer, trained, weights

SLIC = make("slic", target_weight=1.0, target_length="mean")
OTHER = [row["rejected"] for row in text_pairs(6, seed=3)]


def with_targets(targets: list[str]) -> list[dict[str, str]]:
    return [{**row, "target": target} for row, target in zip(text_pairs(6), targets, strict=True)]


def end(folder, rows, **settings) -> torch.Tensor:
    return trained(folder, rows, loss=SLIC, learning_rate=0.1, per_device_train_batch_size=6, **settings)


def test_without_a_target_the_chosen_answer_is_the_target(tmp_path):
    plain, same = end(tmp_path, text_pairs(6)), end(tmp_path, with_targets([row["chosen"] for row in text_pairs(6)]))
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=0)
    assert (end(tmp_path, with_targets(OTHER)) - plain).abs().max() > 1e-4


def test_past_the_margin_it_is_supervised_training_on_the_target(tmp_path):
    """The rejected answers are so long that every margin is met."""
    rows = [{**row, "rejected": "zqx" * 30} for row in with_targets(OTHER)]
    as_chosen = [{"prompt": row["prompt"], "chosen": row["target"], "rejected": row["rejected"]} for row in rows]
    torch.testing.assert_close(end(tmp_path, rows), end(tmp_path, as_chosen), atol=1e-6, rtol=0)


def test_a_reference_is_scored_for_targets_only_where_another_term_wants_one(tmp_path):
    rows = with_targets(OTHER)
    assert "target_ref_logp" not in make_trainer(tmp_path, rows, loss=SLIC).train_dataset[0]
    mixture = Objective([(1.0, make("dpo")), (0.1, SLIC)])
    ways = [(6, 1, "cached"), (2, 3, "live")]
    ends = [
        trained(tmp_path, rows, loss=mixture, reference_block={"source": source}, per_device_train_batch_size=size,
                gradient_accumulation_steps=steps)
        for size, steps, source in ways
    ]  # fmt: skip
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
    assert (ends[0] - weights(make_model())).abs().max() > 1e-3


def test_a_loss_that_reads_no_target_leaves_it_out(tmp_path):
    with_one, without = (trained(tmp_path, rows, loss="simpo") for rows in (with_targets(OTHER), text_pairs(6)))
    assert torch.equal(with_one, without)
    prepared = make_trainer(tmp_path, with_targets(OTHER), loss=SLIC).train_dataset
    trainer = make_trainer(tmp_path, prepared, loss="simpo")
    assert trainer.data_collator(list(trainer.train_dataset))["target_size"] == 0


def test_evaluation_rows_have_a_target_too(tmp_path):
    with pytest.raises(DataError, match="training rows pairs with target"):
        make_trainer(tmp_path, with_targets(OTHER), loss=SLIC, eval_rows=text_pairs(3))
    settings = {"loss": SLIC, "eval_rows": with_targets(OTHER)}
    rows = text_pairs(6, target=" a")
    trainers = [make_trainer(tmp_path, rows, per_device_eval_batch_size=n, **settings) for n in (1, 4)]
    figures = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_a_users_metrics_see_the_two_answers_that_are_compared(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(np.array(prediction.predictions))
        return {}

    for rows in (text_pairs(6), with_targets(OTHER)):
        trainer = make_trainer(tmp_path, rows, loss=SLIC, eval_rows=rows)
        trainer._predictions.compute_metrics = compute_metrics
        trainer.evaluate()
    assert seen[0].shape == (6, 2)
    assert np.allclose(*seen, atol=1e-5)
