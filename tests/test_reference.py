"""Where reference scores come from: right at the first step, and the same at the last."""

from __future__ import annotations

import hashlib

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from prefopt.config import PreferenceConfig
from prefopt.errors import UserError
from prefopt.models import load_model
from prefopt.reference.live import AdapterOff, FrozenModel, NoReference, plan_of
from prefopt.scoring.model import enable_scoring
from prefopt.scoring.modes import evaluating
from prefopt.trainer import PreferenceTrainer
from tests import helpers

ROWS = helpers.text_pairs(8)


@pytest.fixture
def build(tmp_path, tokenizer):
    """A trainer around a model, its reference live; more arguments go to it, settings to its configuration."""

    def make(model, settings=(), **arguments):
        settings = dict(settings)
        settings["reference"] = {"source": "live", **settings.get("reference", {})}
        args = PreferenceConfig(
            output_dir=str(tmp_path / "out"), max_steps=5, per_device_train_batch_size=4, learning_rate=0.05,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            **settings,
        )  # fmt: skip
        return PreferenceTrainer(model, args=args, train_dataset=ROWS, processing_class=tokenizer, **arguments)

    return make


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})


def trained_adapter(model, **settings):
    """A PEFT model whose adapter has been somewhere: its weights are not those of a fresh one."""
    peft_model = get_peft_model(model, lora(**settings))
    torch.manual_seed(7)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return peft_model


def gpt2(tokenizer, dropout=0.0):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def batch_of(trainer):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def reference_scores(trainer):
    return trainer.reference.scores(trainer.model, batch_of(trainer))["ref_logp"]


def plain_scores(model, batch):
    enable_scoring(model)
    with evaluating(model):
        return model(**plan_of(batch))["logp"]


def digest(model):
    """SHA-256 over the names and bytes of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def storages(model):
    return {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}


def first_step(trainer):
    trainer.train()
    return trainer.state.log_history[0]


def assert_starts_at_zero(trainer):
    """The first step's log-ratios, logged before the optimizer moved, are 0; the later ones are not."""
    logged = first_step(trainer)
    assert logged["logratios/chosen"] == logged["logratios/rejected"] == logged["rewards/margins"] == 0
    assert trainer.state.log_history[-2]["logratios/chosen"] != 0


# ---- a frozen copy --------------------------------------------------------------------------------------------------


def test_frozen_copy_stays_as_it_was(build, model):
    trainer = build(model)
    assert isinstance(trainer.reference, FrozenModel) and trainer.reference.is_start
    before, start = digest(trainer.reference.model), digest(model)
    assert before == start
    assert not storages(trainer.reference.model) & storages(model)
    trainer.train()
    assert digest(trainer.reference.model) == before
    assert digest(model) != start
    assert not any(parameter.requires_grad for parameter in trainer.reference.model.parameters())
    assert not any(module.training for module in trainer.reference.model.modules())


def test_frozen_copy_scores_with_its_own_weights(build, model, tokenizer):
    """A forward that still belonged to the original would follow the policy."""
    trainer = build(model)
    trainer.train()
    expected = plain_scores(helpers.make_model(vocab_size=len(tokenizer)), batch_of(trainer))
    assert torch.equal(reference_scores(trainer), expected)


def changed_in_memory(folder):
    model = load_model(str(folder))
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model


def grown(folder):
    model = load_model(str(folder))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


def from_config(folder):
    return LlamaForCausalLM(load_model(str(folder)).config)


@pytest.mark.parametrize("policy", [changed_in_memory, grown, from_config])
def test_reference_is_the_policy_in_memory(policy, build, model, tmp_path):
    """Not what its name on disk holds."""
    model.save_pretrained(tmp_path / "model")
    assert_starts_at_zero(build(policy(tmp_path / "model")))


def test_grown_vocabulary_by_name(build, model, tokenizer, tmp_path):
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(tmp_path / "model")
    assert_starts_at_zero(build(str(tmp_path / "model")))


# ---- the adapter switched off ---------------------------------------------------------------------------------------


def test_fresh_adapter_switched_off_is_the_base(build, tokenizer):
    def base():
        return helpers.make_model(vocab_size=len(tokenizer), dtype=torch.float64)

    trainer = build(base(), peft_config=lora(lora_dropout=0.1))
    assert isinstance(trainer.reference, AdapterOff) and trainer.reference.adapter is None
    assert_starts_at_zero(trainer)
    assert torch.equal(reference_scores(trainer), plain_scores(base(), batch_of(trainer)))


def test_whole_modules_of_an_adapter_are_switched_off_too(build, tokenizer):
    trainer = build(helpers.make_model(vocab_size=len(tokenizer)), peft_config=lora(modules_to_save=["lm_head"]))
    assert_starts_at_zero(trainer)
    expected = plain_scores(helpers.make_model(vocab_size=len(tokenizer)), batch_of(trainer))
    assert torch.equal(reference_scores(trainer), expected)


ADAPTERS = [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}]


@pytest.mark.parametrize("settings", ADAPTERS, ids=["lora", "embeddings", "modules_to_save", "dora"])
def test_trained_adapter_is_copied(settings, build, model):
    """The reference is the policy with the adapter it came with, not the base under it."""
    policy = trained_adapter(model, **settings)
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    trainer = build(policy)
    start = reference_scores(trainer)
    assert torch.equal(start, plain_scores(policy, batch_of(trainer)))
    before = {name: value.clone() for name, value in policy.named_parameters()}
    assert_starts_at_zero(trainer)
    assert torch.equal(reference_scores(trainer), start)
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed and changed <= names
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == names
    assert policy.active_adapter == "default"


ELSEWHERE = ["pissa", "olora", False]


@pytest.mark.parametrize("start", ELSEWHERE)
def test_fresh_adapter_that_does_not_start_at_zero(start, build, model):
    """Switched off it would not be the policy that training began with."""
    trainer = build(model, peft_config=lora(init_lora_weights=start))
    assert torch.equal(reference_scores(trainer), plain_scores(trainer.model, batch_of(trainer)))
    assert_starts_at_zero(trainer)


@pytest.mark.parametrize("start", ELSEWHERE)
def test_copying_an_adapter_leaves_the_policy_alone(start, build, model, tokenizer):
    """PiSSA takes its adapter out of the base weights: done once more for the copy, the policy would be another."""
    policy = get_peft_model(model, lora(init_lora_weights=start))
    batch = batch_of(build(helpers.make_model(vocab_size=len(tokenizer))))
    before = plain_scores(policy, batch)
    trainer = build(policy)
    assert torch.equal(plain_scores(policy, batch), before)
    assert torch.equal(reference_scores(trainer), before)


def test_dropout_of_a_copied_adapter_is_off_in_the_reference(build, model):
    policy = trained_adapter(model, lora_dropout=0.3)
    trainer = build(policy)
    policy.train()
    assert torch.equal(reference_scores(trainer), plain_scores(policy, batch_of(trainer)))
    trainer.train()  # the check of the start is blind to the policy's own dropout


def test_a_second_trainer_copies_the_adapter_anew(build, model):
    policy = trained_adapter(model)
    build(policy).train()
    trainer = build(policy)
    assert torch.equal(reference_scores(trainer), plain_scores(policy, batch_of(trainer)))
    assert_starts_at_zero(trainer)


def test_adapter_that_trains_the_base_is_not_switched_off(build, tokenizer):
    """`bias="lora_only"` moves biases of the base, which no switch restores."""
    settings = lora(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    trainer = build(gpt2(tokenizer), peft_config=settings)
    assert isinstance(trainer.reference, FrozenModel) and trainer.reference.is_start
    assert_starts_at_zero(trainer)
    assert torch.equal(reference_scores(trainer), plain_scores(gpt2(tokenizer), batch_of(trainer)))


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_left_on_does_not_reach_a_margin(build, tokenizer):
    policy = gpt2(tokenizer, dropout=0.3).train()
    trainer = build(policy, peft_config=lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.3))
    assert_starts_at_zero(trainer)
    kept = {module.p for name, module in trainer.model.named_modules() if name.endswith("lora_dropout.default")}
    assert kept == {0.3}


def test_attention_dropout_of_a_frozen_copy(build, tokenizer):
    assert_starts_at_zero(build(helpers.make_model(vocab_size=len(tokenizer), attention_dropout=0.3).train()))


@pytest.mark.parametrize("adapter", [None, "fresh", "trained"])
def test_scoring_restores_every_mode(adapter, build, model):
    policy = trained_adapter(model) if adapter == "trained" else model
    trainer = build(policy, peft_config=lora() if adapter == "fresh" else None)
    trainer.model.train()
    trainer.model.get_submodule("base_model.model" if adapter else "model").eval()
    modes = [module.training for module in trainer.model.modules()]
    assert len(set(modes)) == 2
    reference_scores(trainer)
    assert [module.training for module in trainer.model.modules()] == modes


# ---- a model named by the user --------------------------------------------------------------------------------------


def test_explicit_reference_need_not_equal_the_start(build, model, tokenizer, capsys):
    other = helpers.make_model(5, vocab_size=len(tokenizer))
    trainer = build(model, ref_model=other)
    assert not trainer.reference.is_start
    before = digest(other)
    assert first_step(trainer)["rewards/margins"] != 0
    assert digest(other) == before
    assert torch.equal(reference_scores(trainer), plain_scores(other, batch_of(trainer)))
    assert "start-up margins" not in capsys.readouterr().out


def test_explicit_reference_by_name(build, model, tokenizer, tmp_path):
    other = helpers.make_model(5, vocab_size=len(tokenizer))
    other.save_pretrained(tmp_path / "other")
    trainer = build(model, ref_model=str(tmp_path / "other"))
    assert torch.equal(reference_scores(trainer), plain_scores(other, batch_of(trainer)))


def test_explicit_reference_in_the_settings(build, model, tokenizer, tmp_path):
    """`reference.model`, as a recipe spells it, is not passed over in Python."""
    other = helpers.make_model(5, vocab_size=len(tokenizer))
    other.save_pretrained(tmp_path / "other")
    trainer = build(model, {"reference": {"model": str(tmp_path / "other")}})
    assert not trainer.reference.is_start
    assert torch.equal(reference_scores(trainer), plain_scores(other, batch_of(trainer)))


def test_explicit_reference_for_an_adapter(build, model, tokenizer):
    other = helpers.make_model(5, vocab_size=len(tokenizer))
    trainer = build(model, ref_model=other, peft_config=lora())
    assert isinstance(trainer.reference, FrozenModel)
    assert first_step(trainer)["rewards/margins"] != 0


def test_the_policy_cannot_be_its_own_reference(build, model):
    with pytest.raises(UserError, match="policy itself"):
        build(model, ref_model=model)
    with pytest.raises(UserError, match="policy itself"):
        build(model, ref_model=model, peft_config=lora())


def test_reference_of_another_vocabulary(build, model, tokenizer):
    other = helpers.make_model(vocab_size=len(tokenizer) + 8)
    with pytest.raises(UserError, match=f"vocabulary of {len(tokenizer) + 8} tokens .* {len(tokenizer)}:"):
        build(model, ref_model=other)


def test_reference_with_virtual_tokens(build, model, tokenizer):
    other = helpers.make_model(5, vocab_size=len(tokenizer))
    other = get_peft_model(other, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="virtual tokens"):
        build(model, ref_model=other)


# ---- none -----------------------------------------------------------------------------------------------------------


def test_loss_without_a_reference_holds_no_second_model(build, model):
    trainer = build(model, loss="sft")
    assert isinstance(trainer.reference, NoReference)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(trainer.reference).values())
    assert "rewards/margins" not in first_step(trainer)


def test_reference_given_to_a_loss_that_reads_none(build, model, tokenizer):
    with pytest.raises(UserError, match="reads none"):
        build(model, loss="sft", ref_model=helpers.make_model(5, vocab_size=len(tokenizer)))
