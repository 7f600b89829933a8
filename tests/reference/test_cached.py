"""Reference scores that are computed once: for the same model and answers never again, for others always."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from prefopt.errors import UserError
from prefopt.reference.cached import CachedReference
from prefopt.reference.live import FrozenModel, StartingPolicy
from prefopt.reference.store import Store
from tests import helpers
from tests.training import CentredLoss, make_trainer, weights

ROWS = helpers.text_pairs(9)
ANSWERS = 2 * len(ROWS)
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def build(tmp_path):
    """A trainer with scores from a store of this test's own; the reference is its starting policy."""

    def make(rows=ROWS, *, source="cached", reference=None, folder="run", **settings):
        block = {"source": source, "store": str(tmp_path / "store"), **(reference or {})}
        model = settings.pop("model", None) or helpers.make_model(vocab_size=len(helpers.make_tokenizer()))
        return make_trainer(tmp_path / folder, rows, model=model, reference=False, reference_block=block, **settings)

    return make


def scored(trainer):
    """Answers the run scored itself, and those it found."""
    assert trainer.reference.account.answers == trainer.reference.account.found + trainer.reference.account.scored
    return trainer.reference.account.scored, trainer.reference.account.found


def column(trainer, side="chosen"):
    """The scores beside the rows, as one vector."""
    return np.concatenate([row[f"{side}_ref_logp"] for row in trainer.train_dataset.rows])


@pytest.fixture
def forwards(monkeypatch):
    """Every answer that a reference forward scores, counted at the forward itself."""
    seen = []
    for kind in (StartingPolicy, FrozenModel):
        stock = kind.scores

        def scores(self, policy, batch, stock=stock):
            seen.append(batch["size"])
            return stock(self, policy, batch)

        monkeypatch.setattr(kind, "scores", scores)
    return seen


def test_a_second_run_scores_nothing(build, forwards):
    assert scored(build()) == (ANSWERS, 0)
    assert sum(forwards) == ANSWERS
    forwards.clear()
    again = build()
    assert scored(again) == (0, ANSWERS)
    assert sum(forwards) == again.reference.account.checked == 4


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.3},
        {"loss": CentredLoss()},
        {"folder": "elsewhere"},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"seed": 5, "train_sampling_strategy": "random"},
        {"max_length": 500},
        {"rows": random.Random(0).sample(ROWS, len(ROWS))},
        {"rows": ROWS[:4]},
        {"eval_rows": ROWS[:3]},
        {"peft_config": LoraConfig(**LORA)},
    ],
    ids=" ".join,
)
def test_what_leaves_the_scores_alone_scores_nothing(build, change):
    build()
    assert scored(build(**change))[0] == 0


def test_another_beta_scores_nothing(build):
    from prefopt.losses import make

    build()
    assert scored(build(loss=make("dpo", beta=0.7)))[0] == 0


def test_one_changed_answer_is_scored(build):
    build()
    rows = copy.deepcopy(ROWS)
    rows[4]["chosen"] += " again"
    assert scored(build(rows)) == (1, ANSWERS - 1)


def test_a_changed_prompt_is_scored_with_both_answers(build):
    build()
    rows = copy.deepcopy(ROWS)
    rows[4]["prompt"] += " again"
    assert scored(build(rows))[0] == 2


def test_more_rows_score_the_new_ones(build):
    build(ROWS[:5])
    assert scored(build()) == (8, 10)


def test_an_answer_that_stands_twice_is_scored_once(build):
    twice = [*ROWS, {**ROWS[0], "rejected": " something else"}]
    assert scored(build(twice)) == (ANSWERS + 1, 0)


def one_weight(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.25


def norm_epsilon(model):
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [one_weight, norm_epsilon, lambda model: model.to(torch.bfloat16)])
def test_another_function_scores_everything(build, change):
    build()
    model = helpers.make_model(vocab_size=len(helpers.make_tokenizer()))
    change(model)
    assert scored(build(model=model)) == (ANSWERS, 0)


def test_another_soft_cap_scores_everything(build):
    def model(cap):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(
            Gemma2Config(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                num_key_value_heads=2, vocab_size=len(helpers.make_tokenizer()), final_logit_softcapping=cap,
                attn_implementation="eager",
            )
        )  # fmt: skip

    first, second = build(model=model(30.0)), build(model=model(3.0))
    assert scored(second) == (ANSWERS, 0)
    assert not np.allclose(column(first), column(second), atol=1e-3)


def test_a_template_that_alters_ids_scores_everything(build):
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in ROWS
    ]
    build(chat)
    assert scored(build(chat))[0] == 0
    longer = [{**row, "prompt": [{"role": "system", "content": "Speak."}, *row["prompt"]]} for row in chat]
    assert scored(build(longer)) == (ANSWERS, 0)


def test_a_limit_that_cuts_answers_scores_those(build):
    whole = build()
    shortest = min(min(len(row["prompt_ids"]) for row in whole.train_dataset.rows) + 6, 20)
    cut = build(max_length=shortest, max_dropped=1.0)
    assert scored(cut)[0] > 0


def test_columns_are_the_scores_of_the_reference(build):
    """In other batches, with other padding: the same numbers up to rounding."""
    trainer = build(per_device_train_batch_size=2)
    batch = trainer.data_collator(list(trainer.train_dataset.rows))
    expected = StartingPolicy().scores(trainer.model, batch)["ref_logp"]
    torch.testing.assert_close(batch["ref_logp"], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_training_with_a_column_is_training_beside_the_reference(build, tmp_path, adapter):
    def run(source):
        trainer = build(source=source, num_train_epochs=2, peft_config=adapter and LoraConfig(**adapter))
        trainer.train()
        return weights(trainer.model)

    torch.testing.assert_close(run("cached"), run("live"), atol=1e-6, rtol=0)


def test_margins_are_taken_from_the_column(build):
    trainer = build()
    batch = trainer.data_collator(list(trainer.train_dataset.rows))
    batch["ref_logp"] = batch["ref_logp"] + 10.0
    scores = trainer.score(trainer.model, batch)
    torch.testing.assert_close(scores.log_ratio(), -10.0 * scores.lengths.float(), atol=1e-4, rtol=0)


def test_no_second_model_is_held(build, forwards):
    trainer = build()
    assert isinstance(trainer.reference, CachedReference) and isinstance(trainer.reference.source, StartingPolicy)
    forwards.clear()
    trainer.train()
    assert not forwards and trainer.reference.source is None


def test_an_explicit_reference_is_let_go_before_training(tmp_path, forwards):
    block = {"source": "cached", "store": str(tmp_path / "store")}
    trainer = make_trainer(tmp_path / "run", ROWS, reference_block=block)
    assert isinstance(trainer.reference.source, FrozenModel) and not trainer.reference.is_start
    forwards.clear()
    trainer.train()
    assert not forwards and trainer.reference.source is None


def test_scoring_moves_no_random_state(build):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = []
    for _ in range(2):  # cold, then warm
        trainer = build()
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
        assert trainer is not None
    assert states[0] == states[1]


def test_a_policy_left_in_training_mode_is_scored_without_dropout(build):
    def model():
        made = helpers.make_model(vocab_size=len(helpers.make_tokenizer()), attention_dropout=0.5)
        return made.train()

    dropping = build(model=model(), disable_dropout=False)
    assert dropping.model.training
    plain = build(folder="plain", reference={"store": dropping.args.output_dir + "-other"})
    np.testing.assert_allclose(column(dropping), column(plain), atol=2e-6)


def test_new_rows_are_scored_until_training_moves_the_policy(build):
    trainer = build(ROWS[:5])
    before = trainer.evaluate(ROWS[5:7])
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    after = trainer.evaluate(ROWS[5:7])  # found in the store
    assert abs(after["eval_rewards/margins"]) > 1e-4
    with pytest.raises(UserError, match=r"4 answers have no reference scores.*eval_dataset.*source: live.*evaluate"):
        trainer.evaluate(ROWS[7:])


def test_weights_changed_by_hand_never_enter_the_store(build):
    trainer = build(ROWS[:5])
    one_weight(trainer.model)
    with pytest.raises(UserError, match="the policy has moved"):
        trainer.evaluate(ROWS[5:])


def test_an_adapter_scores_new_rows_at_any_time(build):
    trainer = build(ROWS[:5], peft_config=LoraConfig(**LORA))
    trainer.train()
    figures = trainer.evaluate(ROWS[5:])
    live = build(ROWS[:5], source="live", peft_config=LoraConfig(**LORA), folder="live")
    live.train()
    assert figures["eval_loss"] == pytest.approx(live.evaluate(ROWS[5:])["eval_loss"], abs=1e-6)


def test_several_evaluation_sets(build):
    sets = {"a": ROWS[:2], "b": ROWS[2:5]}
    trainer = build(ROWS[5:], eval_rows=sets)
    assert scored(trainer)[0] == ANSWERS
    trainer.train()
    found = trainer.evaluate()
    for name, rows in sets.items():
        assert found[f"eval_{name}_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], abs=1e-6)


def test_a_damaged_store_is_made_anew(build, tmp_path, capsys):
    first = build()
    (file,) = (tmp_path / "store").glob("*.sqlite")
    file.write_bytes(file.read_bytes()[:300])
    again = build()
    assert scored(again) == (ANSWERS, 0)
    assert file.name in capsys.readouterr().out
    np.testing.assert_array_equal(column(first), column(again))


def test_scores_of_another_model_under_our_key_are_refused(build, tmp_path):
    trainer = build()
    entry = Store(tmp_path / "store").entry(trainer.reference_identity.key, {})
    ids = [id for row in trainer.train_dataset.answer_ids for id in row.values()]
    entry.write({id: scores + 1 for id, scores in entry.read(ids).items()})
    entry.close()
    with pytest.raises(UserError, match=r"\.sqlite: what is stored of an answer differs"):
        build()


def test_a_short_run_scores_beside_the_policy(build, capsys):
    trainer = build(source="auto", max_steps=2, per_device_train_batch_size=2)
    assert not isinstance(trainer.reference, CachedReference)
    assert "18 answers would be scored for a run that reads 8" in capsys.readouterr().out
    build()
    assert isinstance(build(source="auto", max_steps=2, per_device_train_batch_size=2).reference, CachedReference)


def test_auto_caches_a_whole_epoch(build):
    assert isinstance(build(source="auto").reference, CachedReference)


@pytest.mark.parametrize("block", [{"max_gb": 1e-9}, {"store": "a file"}], ids=str)
def test_no_room_in_the_store(build, tmp_path, capsys, block):
    if "store" in block:
        block = {"store": str(tmp_path / "taken")}
        (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be|would pass its limit"):
        build(reference=block)
    trainer = build(source="auto", reference=block)
    assert isinstance(trainer.reference, FrozenModel)
    assert "beside the policy" in capsys.readouterr().out


def test_bytes_are_announced_before_they_are_written(build, capsys):
    build()
    said = capsys.readouterr().out
    assert "18 of 18 answers are to be scored; 0.0 MB of log-probabilities will be written to" in said


def test_a_reference_that_is_not_finite_is_refused(build):
    model = helpers.make_model(vocab_size=len(helpers.make_tokenizer()))
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        build(model=model, self_check=False)


def test_a_collator_that_drops_the_column_is_told(build):
    trainer = build()
    batch = trainer.data_collator(list(trainer.train_dataset.rows))
    del batch["ref_logp"]
    with pytest.raises(UserError, match="ref_logp"):
        trainer.score(trainer.model, batch)


def test_a_reference_in_lower_precision_is_found_again(tmp_path):
    """The bound on what is scored again is that of the model that scores, not of the policy."""
    block = {"source": "cached", "store": str(tmp_path / "store")}
    for expected in (ANSWERS, 0):
        other = helpers.make_model(seed=7, vocab_size=len(helpers.make_tokenizer()), dtype=torch.bfloat16)
        trainer = make_trainer(tmp_path / "run", ROWS, reference=other, reference_block=block)
        assert scored(trainer)[0] == expected


def test_mixed_precision_has_scores_of_its_own_and_margins_of_zero(build):
    build()
    trainer = build(bf16=True)
    assert scored(trainer)[0] == ANSWERS
    trainer.train()  # the check of margins at the start is that of bfloat16
    assert scored(build(bf16=True))[0] == 0


def test_a_trained_adapter_is_its_own_reference(build):
    def policy():
        torch.manual_seed(3)
        return get_peft_model(
            helpers.make_model(vocab_size=len(helpers.make_tokenizer())), LoraConfig(**LORA, init_lora_weights=False)
        )

    def run(source):
        trainer = build(source=source, model=policy(), folder=source)
        trainer.train()
        return weights(trainer.model)

    torch.testing.assert_close(run("cached"), run("live"), atol=1e-6, rtol=0)


def test_a_short_run_counts_all_its_micro_batches(build):
    short = {"source": "auto", "max_steps": 1, "per_device_train_batch_size": 2}
    assert not isinstance(build(**short, gradient_accumulation_steps=4).reference, CachedReference)
    assert isinstance(build(**short, gradient_accumulation_steps=5).reference, CachedReference)
    assert scored(build(**short, gradient_accumulation_steps=4, folder="warm"))[0] == 0


def test_training_twice_goes_on(build):
    trainer = build()
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
