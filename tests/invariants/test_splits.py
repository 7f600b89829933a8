"""The same rows give the same step and the same figures, however they are split into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from prefopt.losses import Objective, get, make, names
from tests.helpers import make_model, text_pairs
from tests.losses.facts import facts_of
from tests.training import CentredLoss, make_trainer, trained, weights

# Ten rows in one step: as 10, 10x1, 4+4+2 and 3+3+3+1.
SPLITS = [(10, 1), (1, 10), (4, 3), (3, 4)]
LAYOUTS = ["plain", "shared"]
# What a loss cannot do without, or reads where it is there.
COLUMNS = {"odpo": ("score_chosen", "score_rejected"), "slic": ("target",)}
SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]
LOSSES = {name: name for name in SHIPPED} | {
    "mixture": Objective([(1.0, make("dpo")), (0.3, make("sft"))]),
    "mixture with distributions": Objective([(1.0, make("tdpo2")), (0.5, make("dpo")), (0.3, make("sft"))]),
    "slic and sft": Objective([(0.2, make("slic")), (0.3, make("sft"))]),
}
# Sums over tokens without a beta make steps so long that their last digits lie above the bound.
RATES = {"slic": 0.1, "slic and sft": 0.1, "ipo": 0.1, "simpo": 0.3}


def rows_for(loss: str) -> list[dict[str, Any]]:
    """Ten rows with the columns that the loss reads: scores that differ from row to row, and targets of their own."""
    rows = text_pairs(5 if loss == "kto" else 10)  # KTO reads a pair as two rows
    made = {
        "score_chosen": [1.0 + index / 4 for index in range(10)],
        "score_rejected": [0.5] * 10,
        "target": [row["rejected"] for row in text_pairs(10, seed=3)],
    }
    wanted = COLUMNS.get(loss.split()[0], ())
    own = facts_of(loss).columns if loss in SHIPPED else {}
    return [{**row, **own, **{name: made[name][index] for name in wanted}} for index, row in enumerate(rows)]


def split(batch: int, steps: int) -> dict[str, int]:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_ten_rows_give_one_step(tmp_path, loss, layout):
    settings = {"loss": LOSSES[loss], "learning_rate": RATES.get(loss, 1.0), "row_layout": layout}
    ends = [trained(tmp_path, rows_for(loss), **settings, **split(*way)) for way in SPLITS]
    assert (ends[0] - weights(make_model())).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_short_last_step_counts_its_own_rows(tmp_path, layout):
    """Thirteen rows, eight a step: the last step has five, in any split."""
    ends = [
        trained(tmp_path, text_pairs(13), num_train_epochs=2, row_layout=layout, **split(*way))
        for way in [(8, 1), (2, 4), (3, 8 // 3)]
    ]
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=0)
    assert (ends[2] - ends[0]).abs().max() > 1e-4  # six a step is another run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_and_checkpointing_change_nothing(tmp_path, layout):
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
    ends = []
    for way, checkpointing in [((10, 1), False), ((4, 3), True), ((1, 10), True)]:
        settings = {**split(*way), "activation_checkpointing": checkpointing, "num_train_epochs": 2}
        settings["row_layout"] = layout
        ends.append(trained(tmp_path, text_pairs(10), peft_config=LoraConfig(**adapter), **settings))
    untrained = weights(make_trainer(tmp_path, text_pairs(10), peft_config=LoraConfig(**adapter)).model)
    assert (ends[0] - untrained).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def test_row_weights_scale_the_values_and_not_the_count(tmp_path):
    rows = text_pairs(6)
    half = [{**row, "weight": 0.5} for row in rows]
    start = weights(make_model())
    full, less = (trained(tmp_path, each, **split(6, 1)) - start for each in (rows, half))
    torch.testing.assert_close(less, full / 2, atol=1e-6, rtol=0)
    silent = [{**row, "weight": float(index < 3)} for index, row in enumerate(rows)]
    three = trained(tmp_path, rows[:3], **split(3, 1)) - start
    torch.testing.assert_close(trained(tmp_path, silent, **split(2, 3)) - start, three / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 5, 7])
def test_evaluation_is_the_plain_mean_over_rows(tmp_path, count, layout):
    rows = text_pairs(count, seed=5)
    figures = []
    for batch in (1, 2, 4, 5):
        settings = {"per_device_eval_batch_size": batch, "row_layout": layout}
        trainer = make_trainer(tmp_path, text_pairs(2), eval_rows=rows, **settings)
        figures.append(trainer.evaluate())
    each = [make_trainer(tmp_path, text_pairs(2), eval_rows=[row]).evaluate() for row in rows]
    names = [name for name in figures[0] if "/" in name or name == "eval_loss"]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(names)
    for name in names:
        mean = sum(one[name] for one in each) / count
        assert [figure[name] for figure in figures] == pytest.approx([mean] * 4, abs=2e-6, rel=1e-6)


def test_a_mixture_is_evaluated_with_its_weights(tmp_path):
    rows = text_pairs(5, seed=5)
    figures = make_trainer(tmp_path, text_pairs(2), loss=LOSSES["mixture"], eval_rows=rows).evaluate()
    parts = [make_trainer(tmp_path, text_pairs(2), loss=name, eval_rows=rows).evaluate() for name in ("dpo", "sft")]
    assert figures["eval_loss"] == pytest.approx(parts[0]["eval_loss"] + 0.3 * parts[1]["eval_loss"], rel=1e-6)


def test_logged_metrics_are_means_over_the_rows_of_the_step(tmp_path):
    logs = []
    for way in SPLITS:
        trainer = make_trainer(tmp_path, text_pairs(10), **split(*way))
        trainer.train()
        logs.append(trainer.state.log_history[0])
    names = {name for name in logs[0] if "/" in name} | {"loss", "grad_norm", "entropy", "num_tokens"}
    for name in names:
        assert [log[name] for log in logs] == pytest.approx([logs[0][name]] * 4, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_estimates_see_the_whole_step(tmp_path, layout):
    """A loss that needs a mean over the step gets the same one in any split, before its first backward."""
    ends = [trained(tmp_path, text_pairs(10), loss=CentredLoss(), row_layout=layout, **split(*way)) for way in SPLITS]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_to_a_multiple_changes_nothing(tmp_path, layout):
    ways = [{"pad_to_multiple_of": multiple, "row_layout": layout} for multiple in (None, 8, 64)]
    ends = [trained(tmp_path, text_pairs(6), **way, **split(3, 2)) for way in ways]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)
