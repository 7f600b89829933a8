"""Opening models and tokenizers: what is refused, what is opened as what, and dropout that is off when it says so."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from prefopt.config import PreferenceConfig
from prefopt.errors import UserError
from prefopt.models import (
    adapter_config,
    complete_tokenizer,
    load_model,
    load_tokenizer,
    open_model,
    open_reference,
    prepare_policy,
    quantization_config,
    silence_dropout,
)
from prefopt.recipe.sections import ModelSection
from tests import helpers

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def args(tmp_path):
    def make(**settings):
        return PreferenceConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **settings)

    return make


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj"], **settings})


def prepare(model, **settings):
    return prepare_policy(model, **{"peft_config": None, "disable_dropout": True, "pad_token_id": 0, **settings})


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_tokenizer_of_a_loaded_model(folder, tokenizer):
    assert load_tokenizer(load_model(folder)).get_vocab() == tokenizer.get_vocab()


def test_tokenizer_of_a_model_from_nowhere(model):
    with pytest.raises(UserError, match="pass its tokenizer as `processing_class`"):
        load_tokenizer(model)


def test_no_tokenizer_in_the_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"no tokenizer could be loaded from `{tmp_path}`"):
        load_tokenizer(str(tmp_path))


def test_pad_token_is_the_end_token_where_there_is_none():
    tokenizer = helpers.make_tokenizer()
    tokenizer.pad_token = None
    assert complete_tokenizer(tokenizer).pad_token == tokenizer.eos_token
    assert complete_tokenizer(helpers.make_tokenizer()).pad_token == "<pad>"


def test_tokenizer_without_an_end():
    tokenizer = helpers.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        complete_tokenizer(tokenizer)


# ---- models ---------------------------------------------------------------------------------------------------------


def test_float32_unless_told_otherwise(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float16").dtype == torch.float16


def test_unknown_dtype(folder):
    with pytest.raises(UserError, match="dtype: `fp32` is not one of auto, float32, bfloat16, float16"):
        load_model(folder, dtype="fp32")


@pytest.mark.parametrize("name", ["no-such-folder", "nobody/no-such-model"])
def test_model_that_is_not_there(name):
    with pytest.raises(UserError, match=f"the model `{name}` could not be loaded"):
        load_model(name)


def test_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UserError, match="no-such-type"):
        load_model(str(tmp_path))


def test_options_that_are_none_are_left_out(folder):
    """`attn_implementation=None` must not override what the model would choose."""
    chosen = load_model(folder).config._attn_implementation
    assert load_model(folder, attn_implementation=None, quantization_config=None).config._attn_implementation == chosen
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_open_model_takes_a_name_or_a_model(folder, model, args):
    assert open_model(model, args()) is model
    opened = open_model(folder, args(model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"}))
    assert opened.dtype == torch.bfloat16 and opened.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="already loaded"):
        open_model(model, args(), object())


def test_the_reference_of_the_settings_is_the_one_opened(folder, model, args):
    init = {"revision": "the-policy-s", "attn_implementation": "eager"}
    opened = open_reference("logp", None, args(reference={"model": folder}, model_init_kwargs=init))
    assert opened.config._name_or_path == folder and opened.config._attn_implementation == "eager"
    assert open_reference("logp", model, args(reference={"model": "no/such/model"})) is model
    assert open_reference("logp", model, args(), object()) is model  # the policy's quantization says nothing of it
    assert open_reference("logp", None, args(reference={"source": "live"})) is None
    assert open_reference("none", None, args(reference={"source": "none"})) is None
    with pytest.raises(UserError, match="this loss needs a reference"):
        open_reference("logp", None, args(reference={"source": "none"}))


@pytest.fixture
def adapter_folder(folder, tmp_path):
    policy = get_peft_model(load_model(folder), lora())
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    policy.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), policy


def test_adapter_folder_opens_as_base_and_trainable_adapter(adapter_folder, folder):
    name, saved = adapter_folder
    policy = load_model(name)
    assert isinstance(policy, PeftModel)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    with torch.no_grad():
        found, expected, base = (each.eval()(IDS).logits for each in (policy, saved, load_model(folder)))
    assert torch.equal(found, expected) and not torch.allclose(found, base)
    assert prepare(policy) is policy


def test_adapter_whose_base_is_gone(adapter_folder, folder, tmp_path):
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{folder}"):
        load_model(adapter_folder[0])


# ---- the policy -----------------------------------------------------------------------------------------------------


def test_adapter_on_top_of_an_adapter(model):
    with pytest.raises(UserError, match="already has an adapter"):
        prepare(get_peft_model(model, lora()), peft_config=lora())


def test_nothing_to_train(model):
    with pytest.raises(UserError, match="no trainable parameter"):
        prepare(model.requires_grad_(False))


def test_frozen_base_with_an_adapter_trains(model):
    policy = prepare(model.requires_grad_(False), peft_config=lora())
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_adapter_loaded_for_inference(adapter_folder, folder):
    with pytest.raises(UserError, match="no trainable parameter"):
        prepare(PeftModel.from_pretrained(load_model(folder), adapter_folder[0]))


@pytest.mark.parametrize("given", ["config", "model"])
def test_prompt_tuning(given, model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"adapter `default` \(PromptTuningConfig\)"):
        prepare(model, peft_config=config) if given == "config" else prepare(get_peft_model(model, config))


def test_adapter_on_the_head(model):
    with pytest.raises(UserError, match="output head"):
        prepare(model, peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_encoder_decoder():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UserError, match="encoder-decoder"):
        prepare(T5ForConditionalGeneration(config))


def test_pad_token_reaches_the_configuration(model):
    assert prepare(model, pad_token_id=3).config.pad_token_id == 3


# ---- dropout --------------------------------------------------------------------------------------------------------


def gpt2():
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))


def llama():
    return helpers.make_model(vocab_size=64, attention_dropout=0.3)


def falcon():
    return FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3,
                     attention_dropout=0.3)
    )  # fmt: skip


def gptj():
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))


def differs(model):
    """Whether two passes in training mode disagree."""
    with torch.no_grad():
        first, second = model.train()(IDS).logits, model(IDS).logits
    return not torch.equal(first, second)


@pytest.mark.parametrize("make", [gpt2, llama, falcon, gptj])
def test_silence(make):
    torch.manual_seed(0)
    model = make()
    assert differs(model)
    assert silence_dropout(model) > 0
    assert not differs(model)
    assert silence_dropout(model) == 0


def test_silence_counts_what_it_found():
    """Llama holds its one probability in the configuration and in each of two attention layers."""
    assert silence_dropout(llama()) == 3
    assert silence_dropout(helpers.make_model()) == 0


def test_dropout_of_an_adapter_stays():
    policy = prepare(get_peft_model(llama(), lora(lora_dropout=0.4)))
    assert {module.p for name, module in policy.named_modules() if isinstance(module, torch.nn.Dropout)} == {0.4}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert differs(policy)


def test_dropout_stays_where_it_is_wanted():
    assert differs(prepare(llama(), disable_dropout=False))


# ---- what a recipe asks for -----------------------------------------------------------------------------------------


def test_adapter_of_a_recipe():
    assert adapter_config(ModelSection(model_name_or_path="m")) is None
    section = ModelSection(model_name_or_path="m", use_peft=True, lora_r=8, lora_alpha=32, lora_dropout=0.2,
                           lora_target_modules=["q_proj"], use_rslora=True)  # fmt: skip
    config = adapter_config(section)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 32, 0.2, True)
    assert config.target_modules == {"q_proj"} and config.task_type == "CAUSAL_LM"


def test_quantization_of_a_recipe():
    assert quantization_config(ModelSection(model_name_or_path="m")) is None
    assert quantization_config(ModelSection(model_name_or_path="m", load_in_4bit=True)).bnb_4bit_quant_type == "nf4"
    assert quantization_config(ModelSection(model_name_or_path="m", load_in_8bit=True)).load_in_8bit
