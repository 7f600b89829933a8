"""Losses that compare whole next-token distributions, trained: where the reference's come from, and what they do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig

from prefopt.losses import Loss, LossOutput, Needs, Objective, Pairs, make
from prefopt.losses.functional import logistic, pair_metrics
from prefopt.reference.live import AdapterOff, FrozenModel
from tests import training
from tests.helpers import make_model, text_pairs
from tests.training import trained, weights

ROWS = text_pairs(8)
STEPS = {"max_steps": 4, "per_device_train_batch_size": 8, "optim": "adamw_torch", "learning_rate": 0.01}


def make_trainer(*args, **settings):
    """A trainer whose reference is scored beside the policy: `auto` would keep so little data in the store."""
    return training.make_trainer(*args, **{"reference_block": {"source": "live"}, **settings})


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian", **settings})


def logs(trainer):
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


# ---- where it comes from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        (None, FrozenModel),
        (lora(), AdapterOff),
        (lora(modules_to_save=["lm_head"]), AdapterOff),
        (lora(modules_to_save=["lm_head", "embed_tokens"]), AdapterOff),
    ],
    ids=["whole model", "adapter", "adapter with a head", "adapter with head and embeddings"],
)
def test_a_run_starts_at_its_reference_and_leaves_it(tmp_path, name, adapter, kind):
    trainer = make_trainer(tmp_path, ROWS, loss=name, reference=False, peft_config=adapter, **STEPS)
    assert isinstance(trainer.reference, kind)
    lines = logs(trainer)
    first, last = lines[0], lines[-1]
    names = ("seqkl/chosen", "seqkl/rejected", "logratios/chosen", "rewards/margins", "loss_argument")
    assert [first[each] for each in names] == pytest.approx([0.0] * 5, abs=2e-6)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["seqkl/chosen"] > 1e-4 and last["seqkl/rejected"] > 1e-4
    assert last["loss"] < first["loss"]


def test_a_frozen_adapter_copy_with_its_own_head_is_a_reference(tmp_path):
    """PiSSA does not start at the base, so the reference is a copy of the adapter as it was."""
    adapter = lora(init_lora_weights="pissa", modules_to_save=["lm_head"])
    trainer = make_trainer(tmp_path, ROWS, loss="tdpo2", peft_config=adapter, **STEPS)
    assert trainer.reference.adapter is not None
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer.reference.distribution(trainer.model, batch).head.clone()
    lines = logs(trainer)
    assert lines[0]["seqkl/chosen"] == pytest.approx(0.0, abs=1e-5) and lines[-1]["seqkl/chosen"] > 1e-4
    assert torch.equal(trainer.reference.distribution(trainer.model, batch).head, before)
    assert not torch.equal(trainer.model.get_output_embeddings().weight, before)


def test_mixed_precision_starts_at_zero(tmp_path):
    lines = logs(make_trainer(tmp_path, ROWS, loss="tdpo2", reference=False, bf16=True, **STEPS))
    assert lines[0]["seqkl/chosen"] == 0.0 and lines[-1]["seqkl/chosen"] > 1e-4


def test_the_reference_given_may_be_of_another_width(tmp_path, tokenizer):
    reference = make_model(seed=7, vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32)
    assert logs(make_trainer(tmp_path, ROWS, loss="tdpo2", reference=reference, **STEPS))[0]["seqkl/chosen"] > 0.01


def test_the_reference_does_not_move(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, loss="tdpo1", reference=False, **STEPS)
    before = [parameter.clone() for parameter in trainer.reference.model.parameters()]
    trainer.train()
    assert all(map(torch.equal, before, trainer.reference.model.parameters()))
    assert not any(parameter.grad is not None for parameter in trainer.reference.model.parameters())


def test_evaluation_and_checkpointing_work(tmp_path):
    settings = {**STEPS, "activation_checkpointing": True}
    trainer = make_trainer(
        tmp_path, ROWS, loss="tdpo2", peft_config=lora(), eval_rows=text_pairs(3, seed=5), **settings
    )
    assert trainer.evaluate()["eval_seqkl/margin"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_seqkl/chosen"] > 1e-5
    plain = make_trainer(tmp_path, ROWS, loss="tdpo2", peft_config=lora(), **STEPS)
    plain.train()
    torch.testing.assert_close(weights(trainer.model), weights(plain.model), rtol=0, atol=1e-6)


def test_half_precision_weights_train(tmp_path, tokenizer):
    model = make_model(vocab_size=len(tokenizer), dtype=torch.bfloat16)
    lines = logs(make_trainer(tmp_path, ROWS, model=model, loss="tdpo2", reference=False, **STEPS))
    assert lines[0]["seqkl/chosen"] == 0.0 and lines[-1]["seqkl/chosen"] > 0.0


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_without_alpha_a_run_is_that_of_dpo(tmp_path):
    settings = {"per_device_train_batch_size": 4, "reference": make_model(seed=7)}
    dpo, tdpo2 = (trained(tmp_path, ROWS, loss=loss, **settings) for loss in ("dpo", make("tdpo2", alpha=0.0)))
    torch.testing.assert_close(tdpo2, dpo, rtol=0, atol=1e-6)
    assert (trained(tmp_path, ROWS, loss=make("tdpo2", alpha=0.5), **settings) - dpo).abs().max() > 1e-4


# ---- a loss of one's own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchored(Loss):
    """DPO with the reverse KL as a penalty and the entropy as a bonus (Source: made for this test)."""

    name = "anchored"
    needs = Needs(reference="distribution", statistics=("reverse_kl", "entropy"))

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = view.chosen.log_ratio(), view.rejected.log_ratio()
        penalty = view.chosen.total("reverse_kl") + view.rejected.total("reverse_kl")
        bonus = view.chosen.mean("entropy") + view.rejected.mean("entropy")
        loss = logistic(0.1 * (a - b)) + 0.1 * penalty - 0.01 * bonus
        return LossOutput(loss, "pair", pair_metrics(view, a, b) | {"penalty": penalty})


def test_a_loss_may_ask_for_the_reverse_kl_and_the_entropy(tmp_path):
    """Its gradient is that of the model's own logits, with no change anywhere else."""
    trainer = make_trainer(tmp_path, ROWS, loss=Anchored(), per_device_train_batch_size=8, row_layout="plain")
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    dense(trainer, batch).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name


def dense(trainer, batch):
    """The mean loss from whole logits."""

    def log_probabilities(model):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        return model(**inputs).logits.flatten(0, 1)[batch["source"]].log_softmax(-1)

    log_p, log_q = log_probabilities(trainer.model), log_probabilities(trainer.reference.model).detach()
    ratio = (log_p - log_q).gather(1, batch["target"].unsqueeze(1)).squeeze(1)

    def totals(values):
        return values.new_zeros(batch["size"]).index_add(0, batch["sequence"], values)

    lengths = totals(torch.ones_like(ratio))
    half = batch["size"] // 2
    (a, b), penalty = totals(ratio).split(half), totals((log_p.exp() * (log_p - log_q)).sum(1))
    bonus = totals(-(log_p.exp() * log_p).sum(1)) / lengths
    penalty, bonus = (values[:half] + values[half:] for values in (penalty, bonus))
    return (logistic(0.1 * (a - b)) + 0.1 * penalty - 0.01 * bonus).mean()


def test_a_mixture_reads_one_reference_for_all(tmp_path):
    """DPO beside TDPO2: its log-probabilities come from the same pass."""
    mixture = Objective([(1.0, make("tdpo2", alpha=0.5)), (1.0, make("dpo"))])
    line = logs(make_trainer(tmp_path, ROWS, loss=mixture, reference=False, **STEPS))[0]
    assert line["loss"] == pytest.approx(2 * 0.693147, abs=1e-5)
