"""Whole reference distributions that are computed once: hidden states with the head, or expected head rows."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from prefopt.errors import UserError
from prefopt.reference.cached import CachedReference
from prefopt.reference.forms import ExpectedHeadRows, HiddenStates
from prefopt.reference.live import FrozenModel
from prefopt.reference.stored import StoredAnswer, as_array, as_tensor
from tests import helpers
from tests.training import make_trainer, weights

ROWS = helpers.text_pairs(9)
ANSWERS = 2 * len(ROWS)
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
HEAD_TOO = {**LORA, "modules_to_save": ["lm_head"]}


@pytest.fixture
def build(tmp_path):
    """A trainer of a loss that compares distributions, with a store of this test's own."""

    def make(
        *, rows=ROWS, source="cached", form="auto", adapter=None, reference=None, folder="run", loss="tdpo2", **settings
    ):
        block = {"source": source, "form": form, "store": str(tmp_path / "store"), **(reference or {})}
        model = settings.pop("model", None) or helpers.make_model(vocab_size=len(helpers.make_tokenizer()))
        peft_config = adapter and LoraConfig(**adapter)
        return make_trainer(
            tmp_path / folder,
            rows,
            model=model,
            loss=loss,
            reference=settings.pop("explicit", False),
            reference_block=block,
            peft_config=peft_config,
            **settings,
        )

    return make


def scored(trainer):
    return trainer.reference.account.scored, trainer.reference.account.found


def scores(trainer):
    """What a batch of all rows says, without gradient."""
    batch = trainer.data_collator(list(trainer.train_dataset.rows))
    with torch.no_grad():
        found = trainer.score(trainer.model, batch)
    return {name: found.statistics[name] for name in ("logp", "ref_logp", "forward_kl")}


WAYS = {
    "hidden states, all weights": ("auto", None, HiddenStates),
    "hidden states, adapter": ("hidden", LORA, HiddenStates),
    "hidden states, adapter and head": ("auto", HEAD_TOO, HiddenStates),
    "expected head rows": ("auto", LORA, ExpectedHeadRows),
}


@pytest.mark.parametrize(("form", "adapter", "kind"), WAYS.values(), ids=WAYS)
def test_training_from_the_store_is_training_beside_the_reference(build, form, adapter, kind):
    def run(source, form):
        trainer = build(source=source, form=form, adapter=adapter, num_train_epochs=2, learning_rate=0.5)
        if source == "cached":
            assert isinstance(trainer.reference.form, kind)
        start = weights(trainer.model)
        trainer.train()
        return weights(trainer.model), start

    (cached, start), (live, _) = run("cached", form), run("live", "auto")
    assert (live - start).abs().max() > 1e-3
    torch.testing.assert_close(cached, live, atol=2e-6, rtol=0)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(("form", "adapter", "kind"), WAYS.values(), ids=WAYS)
def test_scores_from_the_store_are_those_of_the_reference(build, form, adapter, kind, explicit):
    """Also of a reference that is another model: its head is not the policy's, so its rows would be wrong."""
    other = helpers.make_model(seed=7, vocab_size=len(helpers.make_tokenizer()))
    found, expected = {}, {}
    for source, into in (("cached", found), ("live", expected)):
        given = other.__class__(other.config) if explicit else False
        if explicit:
            given.load_state_dict(other.state_dict())
        trainer = build(source=source, form=form, adapter=adapter, explicit=given)
        if explicit and source == "cached":
            assert isinstance(trainer.reference.form, HiddenStates)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        into.update(scores(trainer))
    assert found["forward_kl"].max() > 1e-3
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=4e-6, rtol=0)


def test_a_second_run_computes_nothing(build):
    for form, adapter in (("auto", None), ("auto", LORA)):
        assert scored(build(form=form, adapter=adapter)) == (ANSWERS, 0)
        assert scored(build(form=form, adapter=adapter)) == (0, ANSWERS)
        assert scored(build(form=form, adapter=adapter, loss="tdpo1", learning_rate=0.1)) == (0, ANSWERS)


def test_log_probabilities_and_distributions_are_kept_apart(build):
    assert scored(build(loss="dpo")) == (ANSWERS, 0)
    assert scored(build(loss="tdpo2")) == (ANSWERS, 0)
    rows = build(loss="dpo").train_dataset
    assert rows.reference.startswith("logp-") and "chosen_reference" not in rows[0]


def test_numbers_stay_in_the_store(build):
    rows = build().train_dataset.rows
    assert all(isinstance(row[f"{side}_reference"], StoredAnswer) for row in rows for side in ("chosen", "rejected"))


def test_processes_that_load_data_read_the_store(build):
    trainer = build(dataloader_num_workers=1)
    trainer.train()
    alone = build()
    alone.train()
    torch.testing.assert_close(weights(trainer.model), weights(alone.model), atol=0, rtol=0)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["hidden", "expected"])
def test_margins_and_divergences_are_0_at_the_start(build, adapter):
    found = scores(build(adapter=adapter))
    assert (found["logp"] - found["ref_logp"]).abs().max() < 5e-6
    assert found["forward_kl"].abs().max() < 5e-6


def test_a_damaged_row_is_computed_again(build):
    trainer = build()
    path = trainer.reference.entry.path
    whole = path.read_bytes()
    middle = trainer.train_dataset.rows[3]["chosen_reference"].read().numpy().tobytes()
    assert whole.count(middle) == 1
    place = whole.index(middle)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    again = build()
    assert scored(again) == (1, ANSWERS - 1)
    torch.testing.assert_close(scores(again), scores(trainer), atol=4e-6, rtol=0)


def test_numbers_that_go_while_training_are_missed_by_name(build):
    trainer = build()
    with closing(sqlite3.connect(trainer.reference.entry.path)) as db, db:
        db.execute("DELETE FROM rows WHERE rowid IN (2, 5, 11)")
    with pytest.raises(UserError, match=r"hidden-.*gone or damaged.*same command again"):
        trainer.train()


def test_a_file_deleted_while_training_is_read_to_its_end(build):
    trainer = build()
    trainer.train_dataset.rows[0]["chosen_reference"].read()
    trainer.reference.entry.path.unlink()
    trainer.train()
    assert not trainer.reference.entry.path.exists(), "reading makes no file"


PHI = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def with_bias():
    """A model whose output head has a bias, and not one of zeros."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=len(helpers.make_tokenizer()), **PHI))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("adapter", [None, LORA], ids=["hidden", "expected"])
def test_a_head_with_a_bias(build, adapter):
    trainer = build(model=with_bias(), adapter=adapter)
    live = build(model=with_bias(), adapter=adapter, source="live")
    for each in (trainer, live):
        with torch.no_grad():
            for parameter in each.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert scores(live)["forward_kl"].max() > 1e-3
    torch.testing.assert_close(scores(trainer), scores(live), atol=4e-6, rtol=0)


def test_a_bias_that_differs_or_trains_leaves_hidden_states(build):
    other = with_bias()
    with torch.no_grad():
        other.lm_head.bias.add_(1.0)
    assert isinstance(build(model=with_bias(), adapter=LORA, explicit=other).reference.form, HiddenStates)
    trains = build(model=with_bias(), adapter={**LORA, "bias": "all"})
    assert isinstance(trains.reference.form, HiddenStates)


def test_a_head_in_another_precision_is_another_head(build):
    other = helpers.make_model(vocab_size=len(helpers.make_tokenizer())).to(torch.bfloat16)
    assert isinstance(build(adapter=LORA, explicit=other).reference.form, HiddenStates)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["hidden", "expected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_another_model_are_refused(build, tmp_path, dtype, adapter):
    """Under this model's key, as a patched forward would write them."""
    long = [{"prompt": "the cat", "chosen": " sat on a mat" * 8, "rejected": " ran from it" * 8}] * 4

    def model(seed):
        return helpers.make_model(seed=seed, vocab_size=len(helpers.make_tokenizer())).to(dtype)

    theirs = build(rows=long, model=model(7), adapter=adapter, folder="theirs")
    ours = build(rows=long, model=model(0), adapter=adapter)
    ids = {id for row in ours.train_dataset.answer_ids for id in row.values()}
    ours.reference.entry.write(theirs.reference.entry.read(ids))
    with pytest.raises(UserError, match="what is stored of an answer differs"):
        build(rows=long, model=model(0), adapter=adapter)


def test_expected_rows_are_found_by_products_of_the_same_precision_alone(build, monkeypatch):
    """CUDA rounds the operands of the head's products under autocast, and a CPU does not."""

    def made():
        trainer = build(adapter=LORA, bf16=True)
        return trainer.reference.form.kind, trainer.reference_identity.key, scored(trainer)

    kind, key, first = made()
    with monkeypatch.context() as emulated:
        emulated.setattr("prefopt.scoring.distribution.widens", lambda device: True)
        emulated.setattr("prefopt.scoring.tiles.widened_product", lambda left, right: left.float() @ right.float())
        assert [made(), made()] == [("expected_narrow", key, (ANSWERS, 0)), ("expected_narrow", key, (0, ANSWERS))]
    assert (kind, first) == ("expected", (ANSWERS, 0))
    assert made() == ("expected", key, (0, ANSWERS))


def test_a_soft_cap_leaves_hidden_states(build):
    def model():
        torch.manual_seed(0)
        vocabulary = len(helpers.make_tokenizer())
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        config = Gemma2Config(vocab_size=vocabulary, num_attention_heads=2, num_key_value_heads=2, **sizes)
        return Gemma2ForCausalLM(config)

    trainer = build(model=model(), adapter=LORA)
    assert isinstance(trainer.reference.form, HiddenStates)
    live = build(model=model(), adapter=LORA, source="live")
    torch.testing.assert_close(scores(trainer), scores(live), atol=4e-6, rtol=0)
    with pytest.raises(UserError, match=r"caps its logits.*form: hidden"):
        build(model=model(), adapter=LORA, form="expected")


@pytest.mark.parametrize(("adapter", "reason"), [(None, "head trains"), (HEAD_TOO, "head trains")], ids=["all", "head"])
def test_expected_rows_are_refused_where_they_would_be_wrong(build, adapter, reason):
    with pytest.raises(UserError, match=rf"reference\.form: .*{reason}"):
        build(adapter=adapter, form="expected")


def test_auto_keeps_small_data_and_scores_large_data_beside_the_policy(build, monkeypatch, capsys):
    assert isinstance(build(source="auto").reference, CachedReference)
    monkeypatch.setattr("prefopt.referencing.SMALL", 1000)
    assert isinstance(build(source="auto").reference, CachedReference), "all of it is there already"
    assert isinstance(build(source="auto", adapter=LORA).reference, CachedReference) is False
    assert re.search(r"MB of expected head rows would have to be kept, and `auto` keeps", capsys.readouterr().out)
    assert isinstance(build(source="cached", adapter=LORA).reference, CachedReference)


def test_auto_goes_live_without_room(build):
    trainer = build(source="auto", reference={"max_gb": 1e-9})
    assert isinstance(trainer.reference, FrozenModel)
    with pytest.raises(UserError, match="would pass its limit"):
        build(source="cached", reference={"max_gb": 1e-9})


def test_a_model_in_bfloat16_keeps_half_the_bytes_and_every_bit(build):
    def model():
        return helpers.make_model(vocab_size=len(helpers.make_tokenizer())).to(torch.bfloat16)

    trainer = build(model=model())
    numbers = trainer.train_dataset.rows[0]["chosen_reference"].read()
    assert numbers.dtype == torch.bfloat16 and numbers.shape[1] == trainer.model.config.hidden_size
    assert trainer.reference.form.token_bytes == 2 * numbers.shape[1]
    live = build(model=model(), source="live", per_device_train_batch_size=1)
    torch.testing.assert_close(scores(trainer), scores(live), atol=0.05, rtol=0)


def test_bfloat16_travels_as_its_bits():
    numbers = torch.randn(3, 5).to(torch.bfloat16)
    stored = as_array(numbers)
    assert stored.dtype == np.uint16
    torch.testing.assert_close(as_tensor(stored), numbers, atol=0, rtol=0)


def test_evaluation_rows_that_come_later_are_found_or_refused(build):
    trainer = build()
    trainer.train()
    assert trainer.evaluate(ROWS[:3])["eval_loss"] > 0
    with pytest.raises(UserError, match="no reference scores"):
        trainer.evaluate(helpers.text_pairs(12))
