"""A reference that follows the policy: where it is after each step, what training makes of it, and that it survives."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid
from transformers import TrainerCallback

from prefopt.checkpoints import facts_of
from prefopt.config import PreferenceConfig
from prefopt.errors import UserError
from prefopt.hub.files import run_files
from prefopt.reference.live import FrozenModel
from prefopt.reference.moving import FILE, MovingReference
from prefopt.reference.rule import SyncRule, sync_rule
from tests import helpers
from tests.training import make_trainer, weights

ROWS = helpers.text_pairs(6)
VOCABULARY = len(helpers.make_tokenizer())
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
# Every row in every step, so that the order of rows does not matter.
STEPS: dict[str, Any] = {"per_device_train_batch_size": 6, "num_train_epochs": 7, "learning_rate": 0.3}


def policy(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model far enough from uniform that a step moves its scores in the first digits."""
    return helpers.make_model(seed, vocab_size=VOCABULARY, dtype=dtype, **{"initializer_range": 0.2, **config})


def trained_adapter() -> Any:
    """A PEFT model whose adapter has been somewhere."""
    model = get_peft_model(policy(), LORA)
    torch.manual_seed(7)
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def build(folder: Path, steps: int | None = 2, alpha: float | None = None, **arguments: Any) -> Any:
    """A trainer whose reference moves from the policy's start; for `steps` None it stays there."""
    block = {"source": "live", "sync_steps": steps, "mixup_alpha": alpha}
    settings = {"reference": False, "reference_block": {name: value for name, value in block.items() if value}}
    if arguments.get("model") is None:
        arguments["model"] = policy()
    rows = arguments.pop("rows", ROWS)
    return make_trainer(folder, rows, **{**STEPS, **settings, **arguments})


def lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def reference_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Every weight of the reference that moves, by the policy's names."""
    return {name: theirs.detach().clone() for name, (theirs, _) in trainer.kept[0]._twins().items()}


def scores_differ_by(trainer: Any) -> float:
    """The largest log-ratio of the policy and its reference on the rows of training."""
    data = trainer.train_dataset
    batch = trainer.data_collator([data[index] for index in range(len(data))])
    with torch.no_grad():
        return trainer.score(trainer.model.eval(), batch).log_ratio().abs().max().item()


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_a_reference_stays_unless_it_is_told_to_move():
    assert sync_rule(None) is sync_rule({"source": "live"}) is None
    assert sync_rule({"sync_steps": 512}) == SyncRule(512, 0.6)
    assert str(sync_rule({"sync_steps": 512})) == "moving: every 512 steps, alpha 0.6"
    assert str(SyncRule(1, 1.0)) == "moving: every step, alpha 1"


@pytest.mark.parametrize("alpha", [0.25, 0.6, 1.0])
def test_a_sync_is_the_weighted_mean_of_every_weight(alpha):
    """Tied weights have one name, and are averaged once; a copy is exact."""
    ours, theirs = policy(tie_word_embeddings=True), policy(seed=1, tie_word_embeddings=True)
    before = {name: value.double() for name, value in theirs.state_dict().items()}
    moving = MovingReference(ours, FrozenModel(theirs, is_start=False, summary=""), SyncRule(3, alpha))
    moving.sync()
    for name, value in theirs.state_dict().items():
        wanted = alpha * ours.state_dict()[name].double() + (1 - alpha) * before[name]
        torch.testing.assert_close(value.double(), wanted, atol=1e-7, rtol=1e-6)
        assert alpha < 1 or torch.equal(value, ours.state_dict()[name])


def test_a_buffer_that_is_saved_moves_as_well():
    ours, theirs = policy(), policy(seed=1)
    for model, value, count in ((ours, 1.0, 5), (theirs, 3.0, 2)):
        model.register_buffer("bias_of_a_router", torch.full((4,), value))
        model.register_buffer("count", torch.tensor(count))
    MovingReference(ours, FrozenModel(theirs, is_start=False, summary=""), SyncRule(1, 0.25)).sync()
    assert theirs.bias_of_a_router.tolist() == [2.5] * 4
    assert theirs.count.item() == 5


def test_averages_in_half_precision_are_held_in_float32():
    """Each of these syncs moves a weight by less than half the distance to its neighbour in bfloat16."""
    ours, theirs = policy(dtype=torch.bfloat16), policy(seed=1, dtype=torch.bfloat16)
    moving = MovingReference(ours, FrozenModel(theirs, is_start=False, summary=""), SyncRule(1, 0.001))
    start = {name: value.clone() for name, value in theirs.named_parameters()}
    for _ in range(400):
        moving.sync()
    share = 1 - 0.999**400
    for name, value in theirs.named_parameters():
        wanted = torch.lerp(start[name].float(), dict(ours.named_parameters())[name].float(), share)
        torch.testing.assert_close(value.float(), wanted, rtol=2**-8, atol=1e-4)
    assert moving.bytes == sum(4 * value.numel() for value in theirs.parameters())


@pytest.mark.parametrize(("alpha", "width"), [(0.6, 4), (1.0, 0)])
def test_the_memory_of_the_averages_is_taken_before_the_first_step(alpha, width, tmp_path):
    held = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            held.append(sum(value.nbytes for value in trainer.kept[0]._averages.values()))

    model = policy(dtype=torch.bfloat16)
    trainer = build(tmp_path, 7, alpha, model=model, callbacks=[Look()], max_steps=1)
    trainer.train()
    assert held == [width * sum(value.numel() for value in model.parameters())]


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA])
def test_before_the_first_sync_it_is_the_run_without_one(adapter, tmp_path):
    still = build(tmp_path / "still", None, peft_config=adapter)
    moving = build(tmp_path / "moving", 8, peft_config=adapter)
    for trainer in (still, moving):
        trainer.train()
    assert torch.equal(weights(still.model), weights(moving.model))


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_copy_after_every_step_begins_every_step_at_zero(loss, adapter, tmp_path):
    trainer = build(tmp_path, 1, 1.0, loss=loss, peft_config=adapter)
    trainer.train()
    assert len(lines(trainer)) == 7
    for line in lines(trainer):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        # Scores with gradients and without them differ by rounding alone.
        assert [line["logratios/chosen"], line["logratios/rejected"]] == pytest.approx([0, 0], abs=2e-5)
    assert [line["reference/syncs"] for line in lines(trainer)] == [1, 2, 3, 4, 5, 6, 7]


def dpo_by_hand(model: nn.Module, rows: Any, rule: SyncRule, steps: int, rate: float, beta: float = 0.1) -> nn.Module:
    """TR-DPO as the paper has it: plain gradient descent on whole batches, row by row, in float64."""
    ours = copy.deepcopy(model).double().train()
    theirs = copy.deepcopy(ours).eval()
    for step in range(1, steps + 1):
        losses = []
        for row in rows:
            ratios = [
                logp(ours, row["prompt_ids"], row[side]) - logp(theirs, row["prompt_ids"], row[side]).detach()
                for side in ("chosen_ids", "rejected_ids")
            ]
            losses.append(-logsigmoid(beta * (ratios[0] - ratios[1])))
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(ours.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
                parameter -= rate * gradient
            if step % rule.sync_steps == 0:
                for old, new in zip(theirs.parameters(), ours.parameters(), strict=True):
                    old.copy_(rule.mixup_alpha * new + (1 - rule.mixup_alpha) * old)
    return ours


def logp(model: nn.Module, prompt: Any, answer: Any) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    scores = log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1)
    return scores.gather(1, ids[0, len(prompt) :, None]).sum()


@pytest.mark.parametrize("rule", [SyncRule(2, 0.6), SyncRule(3, 1.0), SyncRule(1, 0.1)], ids=str)
def test_a_run_is_the_loop_written_by_hand(rule, tmp_path):
    model = policy()
    trainer = build(tmp_path, rule.sync_steps, rule.mixup_alpha, model=copy.deepcopy(model), row_layout="plain")
    trainer.train()
    wanted = dpo_by_hand(model, trainer.train_dataset.rows, rule, steps=7, rate=0.3)
    torch.testing.assert_close(weights(trainer.model).double(), weights(wanted), atol=1e-5, rtol=0)
    stayed = dpo_by_hand(model, trainer.train_dataset.rows, SyncRule(9), steps=7, rate=0.3)
    assert (weights(stayed) - weights(wanted)).abs().max() > 1e-3  # so the syncs show


def test_row_layouts_agree(tmp_path):
    shared, plain = (trained_by(tmp_path / layout, row_layout=layout) for layout in ("shared", "plain"))
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)


def trained_by(folder: Path, **settings: Any) -> torch.Tensor:
    trainer = build(folder, **settings)
    trainer.train()
    return weights(trainer.model)


def test_accumulation_counts_optimizer_steps(tmp_path):
    whole = trained_by(tmp_path / "whole")
    parts = trained_by(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_an_evaluation_at_the_step_of_a_sync_sees_the_reference_of_then(tmp_path):
    trainer = build(tmp_path, 7, 1.0, eval_rows=ROWS, eval_strategy="steps", eval_steps=7)
    trainer.train()
    evaluation = next(line for line in trainer.state.log_history if "eval_loss" in line)
    assert evaluation["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_policy_goes_further_from_the_start_than_with_dpo(tmp_path):
    """At equal steps and beta: the reference that came along no longer holds it, which is the paper's point."""
    settings = {"num_train_epochs": 40, "learning_rate": 0.1, "logging_steps": 40}
    far = {}
    for name, steps in (("dpo", None), ("tr_dpo", 8)):
        trainer = build(tmp_path / name, steps, **settings)
        trainer.train()
        far[name] = divergence(trainer.model, policy(), trainer.train_dataset.rows)
    assert far["tr_dpo"] > 1.2 * far["dpo"] > 0


@torch.no_grad()
def divergence(ours: nn.Module, theirs: nn.Module, rows: Any) -> float:
    """KL(policy || start) of the next-token distributions along the chosen answers, a token."""
    found = []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
        new, old = (log_softmax(model(input_ids=ids).logits[0].double(), dim=-1) for model in (ours, theirs))
        found.append((new.exp() * (new - old)).sum(-1)[len(row["prompt_ids"]) - 1 : -1])
    return float(torch.cat(found).mean())


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fresh", "trained", "dora", "whole modules", "beside the biases of the base"])
def test_the_reference_of_an_adapter_becomes_its_copy(kind, tmp_path):
    """It begins where the adapter begins, whose base nothing touches."""
    settings = {
        "dora": {"use_dora": True},
        "whole modules": {"modules_to_save": ["lm_head"]},
        "beside the biases of the base": {"bias": "all"},
    }.get(kind, {})
    model = trained_adapter() if kind == "trained" else policy(attention_bias=kind.startswith("beside"))
    adapter = None if kind == "trained" else dataclasses.replace(LORA, **settings)
    trainer = build(tmp_path, 7, 1.0, model=model, peft_config=adapter, learning_rate=0.1)
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    start = weights(trainer.model)
    assert scores_differ_by(trainer) < 1e-5
    trainer.train()
    assert (weights(trainer.model) - start).abs().max() > 1e-3
    assert scores_differ_by(trainer) < 1e-5
    for name, value in trainer.model.named_parameters():
        if name in base and "._reference." not in name:
            assert torch.equal(value, base[name]), name


def test_the_weights_of_an_adapter_are_averaged_and_not_their_products(tmp_path):
    trainer = build(tmp_path, 7, 0.25, model=trained_adapter(), learning_rate=0.1)
    before = reference_of(trainer)
    trainer.train()
    own = dict(trainer.model.named_parameters())
    after = reference_of(trainer)
    assert len(after) == 8
    for name, value in after.items():
        assert not torch.equal(own[name], before[name])
        torch.testing.assert_close(value, torch.lerp(before[name], own[name].detach(), 0.25), atol=1e-6, rtol=0)


def test_an_adapter_begins_as_the_base_that_it_adds_nothing_to(tmp_path):
    """Its record is that of the base: an earlier stage of a plan may have left that model."""
    fixed, moving = (build(tmp_path / str(steps), steps, peft_config=LORA) for steps in (None, 2))
    assert fixed.reference_identity.key == moving.reference_identity.key


# ---- a run that was cut off -----------------------------------------------------------------------------------------

CUT: dict[str, Any] = {
    "rows": helpers.text_pairs(13),
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "a copy": {"alpha": 1.0},
    "adapter": {"peft_config": LORA},
    "half precision": {"dtype": torch.bfloat16, "alpha": 0.1, "loss": "tdpo2"},
}


def cut(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return build(folder, 3, model=policy(dtype=dtype), **{**CUT, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    """From before the first sync, from the step of one, and from between two."""
    whole = cut(tmp_path / "whole", **KINDS[kind])
    whole.train()
    assert [line["reference/syncs"] for line in lines(whole)] == [0, 0, 1, 1, 1, 2, 2, 2]
    last = load_file(tmp_path / "whole" / "checkpoint-8" / FILE)
    for step in (1, 3, 5):
        again = cut(tmp_path / f"from-{step}", **KINDS[kind], save_steps=8)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert lines(again) == lines(whole)
        saved = load_file(tmp_path / f"from-{step}" / "checkpoint-8" / FILE)
        assert saved.keys() == last.keys() and all(torch.equal(saved[name], last[name]) for name in last)
        own, theirs = reference_of(whole), reference_of(again)
        assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_the_reference_is_sealed_and_its_bytes_are_forecast(tmp_path):
    trainer = cut(tmp_path, num_train_epochs=1)
    trainer.train()
    file = tmp_path / "checkpoint-4" / FILE
    manifest = json.loads((tmp_path / "checkpoint-4" / "manifest.json").read_text())
    assert FILE in manifest["files"]
    assert FILE not in run_files(tmp_path / "checkpoint-4")  # what is sent as the model
    assert 0 <= file.stat().st_size - trainer.kept[0].bytes < 10_000  # its header
    stayed = build(tmp_path / "stayed", None, **CUT)
    stayed.train()
    assert trainer._size - stayed._size == trainer.kept[0].bytes


@pytest.mark.parametrize("reference", [False, policy(seed=3)], ids=["a copy", "named"])
def test_what_is_frozen_in_a_copy_need_not_be_kept(reference, tmp_path):
    """A copy has it from the policy for good; a model that is named has its own."""
    model = policy()
    model.model.requires_grad_(False)
    trainer = build(tmp_path, 1, 0.5, model=model, reference=reference)
    frozen, head = (sum(part.numel() for part in each.parameters()) for each in (model.model, model.lm_head))
    assert trainer.kept[0].bytes == 4 * (head + (frozen if reference else 0))


def test_a_model_alone_is_saved_alone(tmp_path):
    trainer = cut(tmp_path, num_train_epochs=1, save_only_model=True)
    trainer.train()
    assert not list(tmp_path.rglob(Path(FILE).name))


@pytest.mark.parametrize("change", [{"steps": 4}, {"alpha": 0.5}, {"steps": None}])
def test_another_rule_is_another_reference(change, tmp_path):
    cut(tmp_path, num_train_epochs=1).train()
    settings = {"steps": 3, **change}
    other = build(tmp_path, model=policy(), **{**CUT, "num_train_epochs": 1, **settings})
    with pytest.raises(UserError, match=r"not the same run:\n  reference\.(sync_steps: 3|mixup_alpha: 0\.6) in the ch"):
        other.train(resume_from_checkpoint=True)
    settings["allow_change"] = ["reference"]
    build(tmp_path, model=policy(), **{**CUT, "num_train_epochs": 1, **settings}).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_the_reference_is_refused(tmp_path):
    build(tmp_path, None, **{**CUT, "num_train_epochs": 1}).train()
    moving = cut(tmp_path, num_train_epochs=1, allow_change=["reference"])
    with pytest.raises(UserError, match=r"checkpoint-4: does not hold the reference as it was \(_reference/moving"):
        moving.train(resume_from_checkpoint=True)


def test_a_reference_of_other_weights_is_not_taken_from_a_checkpoint(tmp_path):
    cut(tmp_path, num_train_epochs=1).train()
    other = build(tmp_path / "other", model=policy(intermediate_size=32))
    with pytest.raises(UserError, match="not the weights of this run's reference"):
        other.kept[0].restore(tmp_path / "checkpoint-4")


def test_the_record_and_the_facts_name_the_rule(tmp_path):
    cut(tmp_path, num_train_epochs=1).train()
    record = json.loads((tmp_path / "reference.json").read_text())
    assert record["moves"] == {"sync_steps": 3, "mixup_alpha": 0.6}
    assert record["source"] == "live: a copy of the starting policy, moving: every 3 steps, alpha 0.6"
    facts = facts_of(tmp_path / "checkpoint-4")["run"]
    assert facts["reference"] == record["key"]
    assert (facts["reference.sync_steps"], facts["reference.mixup_alpha"]) == (3, 0.6)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_second_start_after_the_reference_has_moved_is_refused(adapter, tmp_path):
    trainer = cut(tmp_path, num_train_epochs=1, peft_config=adapter)
    trainer.train()
    moved, policy_now = reference_of(trainer), weights(trainer.model)
    with pytest.raises(UserError, match="an earlier training has moved it, so this trainer cannot begin from the sta"):
        trainer.train()
    assert all(torch.equal(value, moved[name]) for name, value in reference_of(trainer).items())
    assert torch.equal(weights(trainer.model), policy_now)
    again = cut(tmp_path, num_train_epochs=1, peft_config=adapter)
    again.train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="an earlier training has moved it"):
        again.train()


def test_a_reference_that_has_not_moved_yet_may_start_again(tmp_path):
    trainer = build(tmp_path, 8)
    trainer.train()
    trainer.train()
    assert [line["reference/syncs"] for line in lines(trainer)] == [0] * 7


# ---- what is said, and what is refused ------------------------------------------------------------------------------


def test_auto_means_live_and_says_why(tmp_path, capsys):
    build(tmp_path, reference_block={"sync_steps": 2}, max_steps=1).train()
    said = capsys.readouterr().out
    assert "reference: it moves, and scores of the start would not stay true. It is scored beside the policy" in said
    assert "reference: live: a copy of the starting policy, moving: every 2 steps, alpha 0.6" in said
    assert "start-up margins: largest |log-ratio| 0.0e+00 nats" in said


def test_a_run_too_short_for_a_sync_is_told(tmp_path, capsys):
    build(tmp_path / "long", 7).train()
    assert "so it stays" not in capsys.readouterr().out
    build(tmp_path / "short", 8).train()
    assert "the run has 7 steps, and the reference would first move after 8, so it stays" in capsys.readouterr().out


def test_a_named_reference_of_the_same_architecture_moves_as_well(tmp_path):
    trainer = build(tmp_path, 7, 1.0, reference=policy(seed=3))
    assert scores_differ_by(trainer) > 1
    trainer.train()
    assert scores_differ_by(trainer) < 1e-5


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"num_hidden_layers": 1}, "layers.1."),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, "rope"),
    ],
)
def test_a_named_reference_of_another_architecture_is_refused(other, part, tmp_path):
    with pytest.raises(UserError, match="is of another architecture") as refusal:
        build(tmp_path, reference=policy(**other))
    assert part in str(refusal.value)


def test_a_named_reference_cannot_follow_an_adapter(tmp_path):
    with pytest.raises(UserError, match="with sync_steps the reference of an adapter is a copy of the adapter"):
        build(tmp_path, reference=policy(seed=3), peft_config=LORA)


def test_a_loss_that_reads_no_reference_moves_none(tmp_path):
    with pytest.raises(UserError, match="sync_steps has no effect, since this loss reads no reference"):
        build(tmp_path, loss="simpo")


@pytest.mark.parametrize("launched", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_weights_in_pieces_are_refused_before_anything_is_loaded(launched, tmp_path, monkeypatch):
    monkeypatch.setenv(launched, "true")
    with pytest.raises(UserError, match="FSDP and DeepSpeed hold them in pieces"):
        PreferenceConfig(output_dir=str(tmp_path), reference={"sync_steps": 2})


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"},
        {"metric_for_best_model": "logratios/chosen"},  # early stopping reads it
        {"metric_for_best_model": "kl_per_token/entropy"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
    ],
)
def test_figures_from_a_moving_reference_cannot_choose_a_step(settings, tmp_path):
    settings = {"output_dir": str(tmp_path), **EVERY_STEP, **settings}
    PreferenceConfig(**settings)
    with pytest.raises(UserError, match=r"^reference: sync_steps makes figures of different steps"):
        PreferenceConfig(**settings, reference={"sync_steps": 2})


@pytest.mark.parametrize("metric", ["logps/chosen", "eval_logps/rejected", "eval_held_out_entropy"])
def test_figures_that_read_no_reference_can(metric, tmp_path):
    settings = {"output_dir": str(tmp_path), **EVERY_STEP, "load_best_model_at_end": True}
    PreferenceConfig(**settings, metric_for_best_model=metric, reference={"sync_steps": 2})


def test_a_best_model_whose_reference_is_not_saved_is_refused(tmp_path):
    settings = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "entropy"}
    with pytest.raises(UserError, match="the best checkpoint does not hold it as it was then"):
        build(tmp_path, save_only_model=True, **settings)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_best_model_comes_back_with_the_reference_of_its_step(adapter, tmp_path):
    settings = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "logps/rejected"}
    trainer = build(tmp_path, 2, eval_rows=ROWS, peft_config=adapter, greater_is_better=True, **settings)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 7
    then = next(line for line in trainer.state.log_history if "eval_loss" in line and line["step"] == best)
    now = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
        assert now[name] == pytest.approx(then[name], abs=1e-5)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"sync_steps": 0}, "sync_steps must be at least 1, not 0"),
        ({"sync_steps": True}, "sync_steps must be a number"),
        ({"sync_steps": 2, "mixup_alpha": 0.0}, "mixup_alpha must be above 0 and at most 1, not 0.0"),
        ({"sync_steps": 2, "source": "cached"}, "source cached keeps the scores of one reference"),
        ({"sync_steps": 2, "form": "hidden"}, "form has no effect with sync_steps"),
        ({"mixup_alpha": 0.5}, "mixup_alpha has no effect without sync_steps"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(block, reason, tmp_path):
    with pytest.raises(UserError, match=f"^reference: {reason}"):
        PreferenceConfig(output_dir=str(tmp_path), reference=block)
