"""A wrong number stops the run: before the first step where it can be seen there, else before the optimizer moves."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, TrainerCallback

from prefopt.checks import check_start
from prefopt.config import PreferenceConfig
from prefopt.data.dataset import TokenDataset
from prefopt.data.prepare import Preparation
from prefopt.data.spec import DataSpec
from prefopt.errors import DataError, NonFiniteError, UserError
from prefopt.losses import Objective
from prefopt.trainer import PreferenceTrainer
from tests import helpers
from tests.training import make_trainer

SCALE = 0.0625
STEPS = 6


@pytest.fixture
def build(tmp_path, tokenizer):
    """A trainer that logs and saves at every step, its reference beside the policy."""

    def make(model, rows=None, callbacks=None, **settings):
        args = PreferenceConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=STEPS, learning_rate=0.01,
            logging_steps=1, save_steps=1, train_sampling_strategy="sequential", report_to="none", use_cpu=True,
            disable_tqdm=True, **{"bf16": False, "reference": {"source": "live"}, **settings},
        )  # fmt: skip
        data = helpers.text_pairs(12) if rows is None else rows
        return PreferenceTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)

    return make


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unmoved(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- before the first step ------------------------------------------------------------------------------------------


def test_a_sound_start_is_said_in_three_lines(build, model, capsys):
    trainer = build(model)
    check_start(trainer, trainer.model)
    reference, scores, margins = capsys.readouterr().out.splitlines()[-3:]
    assert reference == "reference: live: a frozen copy of the starting policy"
    assert scores.startswith("self-check: scores agree with the model's own logits to ")
    assert margins.startswith("start-up margins: largest |log-ratio| 0.0e+00 nats")


def nudge(parameter):
    parameter.data *= 1.01


def poison(parameter):
    parameter.data[0, 0] = math.nan


@pytest.mark.parametrize("tamper", [nudge, poison])
def test_a_reference_that_is_not_the_start_is_refused(tamper, build, model):
    trainer = build(model)
    before = weights(model)
    tamper(trainer.reference.model.get_output_embeddings().weight)
    with pytest.raises(UserError, match=r"the reference is not the starting policy.*ref_model"):
        trainer.train()
    assert trainer.state.global_step == 0 and unmoved(model, before)


def test_scores_that_are_not_those_of_the_start_are_refused(build, model):
    trainer = build(model, reference={"source": "cached"})
    for row in trainer.train_dataset.rows:
        row["chosen_ref_logp"] = row["chosen_ref_logp"] + 0.01
    with pytest.raises(UserError, match="the reference is not the starting policy"):
        trainer.train()


def test_dropout_in_the_reference_is_found(build, model):
    """A reference that draws random numbers is not the starting policy, whoever switched them on."""
    trainer = build(model)
    trainer.reference.model.model.norm.register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.3, training=True)
    )
    with pytest.raises(UserError, match="not the starting policy"):
        trainer.train()


def cohere(tokenizer):
    """A family that multiplies its logits."""
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=SCALE, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = CohereForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def test_the_bound_on_margins_knows_the_precision(build, model, capsys):
    bounds = []
    for settings in ({}, {"bf16": True}):
        trainer = build(model, **settings)
        check_start(trainer, trainer.model)
        bounds.append(float(re.search(r"rounding bound (\S+)\)", capsys.readouterr().out).group(1)))
    assert bounds[1] / bounds[0] == pytest.approx(2**16, rel=0.1)  # of 23 bits after the point, bfloat16 keeps 7


def test_scores_that_forget_a_scale_are_refused(build, tokenizer, monkeypatch):
    """Policy and reference would agree with each other: only the model's own logits tell."""
    trainer = build(cohere(tokenizer))
    before = weights(trainer.model)
    monkeypatch.setattr("prefopt.scoring.model.head_transform", lambda config: (1.0, None))
    with pytest.raises(UserError, match=rf"CohereForCausalLM differ.*logit_scale={SCALE}"):
        trainer.train()
    assert unmoved(trainer.model, before)


def test_the_self_check_can_be_switched_off(build, tokenizer, monkeypatch, capsys):
    trainer = build(cohere(tokenizer), self_check=False)
    monkeypatch.setattr("prefopt.scoring.model.head_transform", lambda config: (1.0, None))
    check_start(trainer, trainer.model)
    assert "self-check" not in capsys.readouterr().out


def test_a_family_with_a_scale_passes(build, tokenizer):
    trainer = build(cohere(tokenizer))
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_the_check_leaves_modes_and_random_state_alone(build, model):
    trainer = build(model)
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    modes = [module.training for module in trainer.model.modules()]
    state = torch.get_rng_state()
    check_start(trainer, trainer.model)
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_is_not_compared_with_the_reference(build, model, tokenizer, tmp_path, capsys):
    """By then the policy has moved, and should differ."""
    build(model).train()
    capsys.readouterr()
    trainer = build(helpers.make_model(vocab_size=len(tokenizer)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert trainer.state.global_step == STEPS
    assert "start-up margins" not in capsys.readouterr().out


# ---- in the middle of a run -----------------------------------------------------------------------------------------


class BeforeStep(TrainerCallback):
    """Does something to the model before one step, then remembers the weights."""

    def __init__(self, step, tamper):
        self.step, self.tamper, self.weights = step, tamper, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.tamper(model)
            self.weights = weights(model)


def nan_in_a_weight(model):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan


def infinite_gradient(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)


def named_rows(error):
    return [int(row) for row in re.search(r"\[(.*)\]", str(error.value)).group(1).split(",")]


def same_bits(model, before):
    """Equal weights, NaN being equal to NaN."""
    pairs = ((value, before[name]) for name, value in model.state_dict().items())
    return all(torch.equal(value.nan_to_num(7.0), old.nan_to_num(7.0)) for value, old in pairs)


@pytest.mark.parametrize(("tamper", "what"), [(nan_in_a_weight, "loss"), (infinite_gradient, "gradient")])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_a_step_that_is_not_finite_moves_nothing(tamper, what, settings, build, model, tmp_path):
    callback = BeforeStep(3, tamper)
    trainer = build(model, callbacks=[callback], **settings)
    with pytest.raises(NonFiniteError, match=rf"step 3: the {what} .*not finite") as caught:
        trainer.train()
    rows_of_step = 2 * trainer.args.gradient_accumulation_steps
    assert named_rows(caught) == [row % 12 for row in range(2 * rows_of_step, 3 * rows_of_step)]
    assert same_bits(model, callback.weights)
    assert trainer.state.global_step == 2
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def token_rows(build, model, **columns):
    """Prepared rows, as a user may hand them over, with columns of their own."""
    rows = [dict(row) for row in build(model).train_dataset.rows]
    for index, row in enumerate(rows):
        row["columns"] = {name: values[index] for name, values in columns.items()}
    return TokenDataset(rows)


@pytest.mark.parametrize(("accumulation", "step"), [(1, 4), (3, 2)])
def test_a_bad_number_in_a_row_stops_at_its_step(accumulation, step, build, model, tokenizer):
    """Every other row is sound, so the steps before are taken, and of the step the micro-batch alone is named."""
    rows = token_rows(build, model, weight=[1.0] * 7 + [math.nan] + [1.0] * 4)
    callback = BeforeStep(step, lambda policy: None)
    policy = helpers.make_model(vocab_size=len(tokenizer))
    trainer = build(policy, rows, [callback], gradient_accumulation_steps=accumulation)
    with pytest.raises(NonFiniteError, match=f"step {step}: the loss is not finite") as caught:
        trainer.train()
    assert 7 in named_rows(caught) and len(named_rows(caught)) == 2
    assert trainer.state.global_step == step - 1
    assert unmoved(policy, callback.weights)


def test_a_bad_number_in_raw_rows_is_refused_before_training(build, model):
    rows = helpers.text_pairs(12, weight=1.0)
    rows[7]["weight"] = math.nan
    with pytest.raises(DataError, match=r"row 7.*weight"):
        build(model, rows)


def test_a_column_the_loss_minds_is_refused_before_training(build, model):
    rows = token_rows(build, model, preference=[0.9] * 11 + [1.7])
    with pytest.raises(DataError, match=r"row 11: `preference` is 1\.7"):
        build(model, rows)


def test_a_raw_row_the_loss_minds_is_refused_at_its_place(build, model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{**row, "preference": 0.9} for row in helpers.text_pairs(12)]
    rows[7]["preference"] = -0.25
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = build(model)
    with pytest.raises(DataError, match=r"row 7.*column `preference`"):
        build(model, rows)
    scored = [{**row, "score_chosen": 1.0, "score_rejected": float(index == 7) * 2} for index, row in enumerate(rows)]
    path.write_text("".join(json.dumps({**row, "preference": None}) + "\n" for row in scored))
    preparation = Preparation.for_objective(trainer.processing_class, trainer.args, Objective.of("odpo"), say=print)
    with pytest.raises(DataError, match=r"pairs\.jsonl:8: `score_chosen` is 1\.0 and .* they contradict"):
        preparation.train_and_test(DataSpec(data_files=str(path)))


def test_a_run_whose_learning_rate_is_never_above_0_is_told(tmp_path, capsys):
    rows = helpers.text_pairs(4)
    warm = {"warmup_steps": 0.1, "lr_scheduler_type": "linear", "per_device_train_batch_size": 4}
    make_trainer(tmp_path, rows, **warm).train()
    assert "with warmup_steps its learning rate is 0, so nothing is learnt" in capsys.readouterr().out
    for settings in ({"num_train_epochs": 2}, {"warmup_steps": 0}, {"lr_scheduler_type": "constant"}):
        make_trainer(tmp_path, rows, **{**warm, **settings}).train()
        assert "nothing is learnt" not in capsys.readouterr().out


def test_an_evaluation_that_is_not_finite_raises(build, model):
    trainer = build(model)
    nan_in_a_weight(model)
    with pytest.raises(NonFiniteError, match="evaluation after step 0: the loss is nan"):
        trainer.evaluate(helpers.text_pairs(3))
