"""What a user of `PreferenceTrainer` relies on beyond exactness: options, evaluation sets, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainerCallback

from prefopt.config import PreferenceConfig
from prefopt.data.prepare import Preparation
from prefopt.errors import DataError, UserError
from prefopt.losses import make
from prefopt.predictions import Predictions
from prefopt.scoring import TokenScores
from prefopt.trainer import PreferenceTrainer
from tests.helpers import WORDS, make_model, make_tokenizer, text_pairs
from tests.training import CentredLoss, make_trainer, trained, weights

ADAM = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0}


def preferring(word: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose chosen answer ends in one word and the rejected one in another."""
    other = next(each for each in WORDS if each != word)
    rows = text_pairs(count, seed=seed)
    return [{**row, "chosen": f"{row['chosen']} {word}", "rejected": f"{row['chosen']} {other}"} for row in rows]


def test_dpo_learns_what_is_preferred_and_sft_what_is_said(tmp_path):
    """The promise of each loss on held-out rows of a preference that can be learned."""
    rows, held_out = preferring("dawn", 48), preferring("dawn", 24, seed=9)
    start, end = {}, {}
    for loss in ("dpo", "sft"):
        settings = {**ADAM, "num_train_epochs": 4, "per_device_train_batch_size": 8}
        trainer = make_trainer(tmp_path, rows, loss=loss, model=make_model(), eval_rows=held_out, **settings)
        start[loss] = trainer.evaluate()
        trainer.train()
        end[loss] = trainer.evaluate()
    assert end["dpo"]["eval_rewards/accuracies"] > 0.95
    assert end["dpo"]["eval_loss"] < 0.8 * start["dpo"]["eval_loss"]
    assert end["sft"]["eval_nll_loss"] < start["sft"]["eval_nll_loss"] - 1.0


def test_soft_labels_stop_at_their_own_margin(tmp_path):
    """With the preference at one half there is nothing to learn: the gradient at a margin of 0 vanishes."""
    rows = [{**row, "preference": 0.5} for row in text_pairs(6)]
    trainer = make_trainer(tmp_path, rows, reference=make_model(), per_device_train_batch_size=6)
    trainer.train()
    torch.testing.assert_close(weights(trainer.model), weights(make_model()), atol=1e-6, rtol=0)


def test_bfloat16_and_checkpointing_follow_float32(tmp_path):
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.1}
    exact = trained(tmp_path, text_pairs(8), **settings) - weights(make_model())
    rough = trained(tmp_path, text_pairs(8), bf16=True, activation_checkpointing=True, **settings) - weights(
        make_model()
    )
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])])
def test_an_evaluation_before_training_is_in_the_precision_of_training(tmp_path, peft_config):
    """Policy and reference alike: in different ones they would differ by more than nothing."""
    rows = text_pairs(5)
    args = make_trainer(tmp_path, rows, bf16=True, learning_rate=0.0).args
    trainer = PreferenceTrainer(
        make_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_logratios/chosen"] == before["eval_logratios/rejected"] == 0
    assert before["eval_logps/chosen"] == after["eval_logps/chosen"]


def test_loader_workers_change_nothing(tmp_path):
    ends = [
        trained(tmp_path, text_pairs(9), per_device_train_batch_size=4, dataloader_num_workers=count)
        for count in (0, 2)
    ]
    assert torch.equal(*ends)


def test_evaluation_sets_by_name_give_the_figures_of_each_alone(tmp_path):
    sets = {"near": text_pairs(5, seed=4), "far": text_pairs(3, seed=5)}
    together = make_trainer(tmp_path, text_pairs(4), eval_rows=sets).evaluate()
    for name, rows in sets.items():
        alone = make_trainer(tmp_path, text_pairs(4), eval_rows=rows).evaluate()
        assert together[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


def test_new_rows_are_evaluated_against_the_starting_reference(tmp_path):
    """After training, a set given to `evaluate` must not take the trained policy for its own reference."""
    live = {"source": "live"}
    trainer = make_trainer(tmp_path, text_pairs(8), per_device_train_batch_size=4, reference_block=live)
    before = {name: value.clone() for name, value in trainer.reference.model.state_dict().items()}
    trainer.train()
    figures = trainer.evaluate(Dataset.from_list(text_pairs(4, seed=8)))
    assert abs(figures["eval_logratios/chosen"]) > 1e-3
    assert all(torch.equal(before[name], value) for name, value in trainer.reference.model.state_dict().items())


def test_compute_metrics_sees_each_row_once_in_order(tmp_path):
    seen = []

    def count(prediction) -> dict[str, float]:
        seen.append(prediction)
        return {"wins": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    rows = text_pairs(7, seed=2)
    stock = make_trainer(tmp_path, text_pairs(2), eval_rows=rows, per_device_eval_batch_size=3)
    trainer = PreferenceTrainer(
        make_model(),
        make_model(seed=7),
        stock.args,
        train_dataset=text_pairs(2),
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        compute_metrics=count,
    )
    figures = trainer.evaluate()
    assert figures["eval_wins"] == pytest.approx(figures["eval_rewards/accuracies"])
    assert seen[0].predictions.shape == (7, 2)
    single = [stock.evaluate([row])["eval_logratios/chosen"] for row in rows]
    np.testing.assert_allclose(seen[0].predictions[:, 0], single, atol=1e-5)
    trainer.evaluate()
    assert seen[1].predictions.shape == (7, 2)  # nothing is left from the first time


def test_labels_of_single_answers_follow_their_rows():
    predictions = Predictions(lambda prediction: {"labels": prediction.label_ids.tolist()})
    batch = {"row": torch.tensor([4, 1, 2]), "paired": False, "desirable_size": 1}
    predictions.add(batch, TokenScores(3, torch.arange(3), logp=-torch.ones(3)))
    assert predictions.metrics("eval") == {"labels": [0, 0, 1]}


def answers(labels: list[bool], **more: str) -> list[dict[str, object]]:
    """Single answers with these labels."""
    rows = text_pairs(len(labels), seed=6)
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": label, **more}
        for row, label in zip(rows, labels, strict=True)
    ]


def test_compute_metrics_of_a_loss_that_reads_desirable_answers_alone(tmp_path):
    rows = answers([True, False, True, True, False])
    trainer = make_trainer(tmp_path, rows, loss="sft", eval_rows=rows, per_device_eval_batch_size=3)
    seen = []
    trainer._predictions.compute_metrics = lambda prediction: (
        seen.append(prediction)
        or {
            "count": prediction.label_ids.sum(),
            "eval_named": 1.0,
        }
    )
    figures = trainer.evaluate()
    assert seen[0].predictions.shape == (3, 1)
    assert figures["eval_count"] == 3 and type(figures["eval_count"]) is int  # JSON holds it
    assert figures["eval_named"] == 1.0 and "eval_eval_named" not in figures


def test_a_loss_never_starts_without_an_answer_to_read(tmp_path):
    """The shortest rows, which the start is checked on, may all be undesirable; all rows may not."""
    short = [{**row, "completion": " a"} for row in answers([False] * 5)]
    trainer = make_trainer(tmp_path, short + answers([True] * 3), loss="sft", per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.global_step == 2  # of the three that are read
    with pytest.raises(DataError, match="reads desirable answers alone"):
        make_trainer(tmp_path, short, loss="sft")
    with pytest.raises(DataError, match="reads desirable answers alone"):
        make_trainer(tmp_path, answers([True]), loss="sft", eval_rows=short)


def test_rows_are_grouped_by_what_is_read(tmp_path):
    """Rejected answers that no loss reads must not spread the chosen ones over batches of unlike lengths."""
    lengths = [int(index) for index in np.random.default_rng(0).permutation(32)]
    rows = [{"prompt": "the", "chosen": " a" * (2 + length), "rejected": " cat" * (50 - length)} for length in lengths]
    trainer = make_trainer(tmp_path, rows, loss="sft", per_device_train_batch_size=4)
    for batch in trainer.get_train_dataloader():
        read = (batch["input_ids"] != trainer.data_collator.pad_token_id).sum(1)
        assert int(read.max() - read.min()) == 3


def test_tokens_are_counted_once(tmp_path):
    counts = []
    for way in ("no", "all"):
        trainer = make_trainer(tmp_path, text_pairs(4), include_num_input_tokens_seen=way)
        trainer.train()
        counts.append(trainer.state.num_input_tokens_seen)
    assert counts[0] == counts[1] == sum(trainer.train_dataset.lengths)


def test_a_dict_of_splits_trains_on_its_train_split_and_predict_takes_raw_rows(tmp_path):
    splits = DatasetDict({"train": Dataset.from_list(text_pairs(3)), "test": Dataset.from_list(text_pairs(2, seed=3))})
    trainer = make_trainer(tmp_path, splits, eval_rows=text_pairs(2, seed=3))
    assert len(trainer.train_dataset) == 3
    predicted = trainer.predict(text_pairs(2, seed=3)).metrics
    assert predicted["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_the_best_checkpoint_is_found_and_loaded(tmp_path):
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        tmp_path,
        text_pairs(8),
        eval_rows=text_pairs(4, seed=3),
        per_device_train_batch_size=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        eval_on_start=True,
        **schedule,
    )
    trainer.train()
    margins = [line["eval_rewards/margins"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(margins) == 3
    assert trainer.state.best_metric == max(margins[1:])
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(max(margins[1:]), abs=1e-6)


def test_the_random_state_is_left_alone_by_the_checks(tmp_path):
    """What a run draws does not depend on whether it checks itself first."""

    class Draw(TrainerCallback):
        numbers: list[float] = []

        def on_step_begin(self, *args, **kwargs):
            self.numbers.append(torch.rand(1).item())

    draws = []
    for check in (True, False):
        callback = Draw()
        callback.numbers = []
        make_trainer(tmp_path, text_pairs(4), callbacks=[callback], self_check=check).train()
        draws.append(callback.numbers)
    assert draws[0] == draws[1]


def test_a_loss_object_with_its_knobs(tmp_path):
    trainer = make_trainer(tmp_path, text_pairs(4), loss=make("dpo", beta=0.7))
    assert trainer.objective.losses[0].beta == 0.7


@pytest.mark.parametrize(
    ("rows", "loss", "message"),
    [
        ([{"prompt": "a", "completion": " b", "label": True}], "dpo", "a pair"),
        ([{"prompt": "a", "chosen": " b"}], "dpo", "rejected"),
        ([], "dpo", "no row"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_a_model_is_loaded(tmp_path, rows, loss, message):
    with pytest.raises(DataError, match=message):
        PreferenceTrainer(
            "no/such/model",
            args=PreferenceConfig(output_dir=str(tmp_path)),
            loss=loss,
            train_dataset=rows,
            processing_class=make_tokenizer(),
        )


def test_evaluation_rows_must_be_like_the_training_rows(tmp_path):
    soft = [{**row, "preference": 0.8} for row in text_pairs(2)]
    with pytest.raises(DataError, match="same columns"):
        make_trainer(tmp_path, text_pairs(2), eval_rows=soft)
    with pytest.raises(DataError, match="evaluation rows are single answers, training rows pairs"):
        make_trainer(tmp_path, text_pairs(2), loss="sft", eval_rows=answers([True]))


def test_no_rows_at_all(tmp_path):
    with pytest.raises(UserError, match="give train_dataset"):
        make_trainer(tmp_path, None)


def test_prepared_rows_are_taken_as_they_are(tmp_path):
    args = PreferenceConfig(output_dir=str(tmp_path))
    prepared = Preparation(make_tokenizer(), args, say=lambda *lines: None).one(text_pairs(3), "train")
    assert make_trainer(tmp_path, prepared, loss="sft").train_dataset is prepared
    scored = make_trainer(tmp_path, prepared).train_dataset
    assert scored.fingerprint == prepared.fingerprint and "chosen_ref_logp" not in prepared.rows[0]
    assert make_trainer(tmp_path, scored).train_dataset is scored


def test_settings_that_act_on_rows_and_dropout(tmp_path):
    def order(**settings):
        trainer = make_trainer(tmp_path, text_pairs(12), per_device_train_batch_size=2, **settings)
        return list(trainer.get_train_dataloader().batch_sampler)

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=1)
    rows = text_pairs(5, seed=3)
    kept, whole = (
        make_trainer(tmp_path, text_pairs(8), eval_rows=rows, dataloader_drop_last=drop, per_device_eval_batch_size=2)
        for drop in (True, False)
    )
    assert kept.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    for disable, left in ((True, 0.0), (False, 0.3)):
        trainer = make_trainer(
            tmp_path, rows, model=make_model(attention_dropout=0.3), loss="sft", disable_dropout=disable
        )
        assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {left}


def test_estimates_are_the_same_whatever_the_mode_the_batch_and_the_random_state(tmp_path):
    """They stand for the step, so dropout must not move them, nor they the random state that a resumed run restores."""
    rows = text_pairs(6)
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer(tmp_path, rows, loss=CentredLoss(), eval_rows=rows, peft_config=peft_config)
    loader = trainer.get_eval_dataloader()
    trainer.model.train()
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        parameter.data += 0.05 * parameter.requires_grad * torch.randn_like(parameter)
    before = torch.get_rng_state()
    first, second = trainer._estimate(loader), trainer._estimate(loader)
    assert first == second and first["0/mean"] != 0
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training
    figures = []
    for batch in (1, 4):
        trainer.args.per_device_eval_batch_size = batch
        figures.append(trainer.evaluate()["eval_loss"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
