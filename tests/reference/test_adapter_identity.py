"""An adapter is part of the function, and the model below it has the key of one that never had any."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from prefopt.errors import UserError
from prefopt.reference.identity import ADAPTER_OFF, identify
from tests import helpers
from tests.reference.identities import ADAPTERS, add_copy, changed_parts, key, lora, with_adapter


@pytest.fixture(scope="module")
def original():
    return identify(helpers.make_model())


@pytest.fixture(params=ADAPTERS)
def adapted(request):
    return with_adapter(copy.deepcopy(ADAPTERS[request.param]))


def test_the_base_below_an_adapter_is_the_plain_model(original, adapted):
    assert changed_parts(original, identify(adapted, adapter=ADAPTER_OFF)) == set()
    assert identify(adapted, adapter=ADAPTER_OFF).weights == original.weights
    if not adapted.peft_config["default"].is_prompt_learning:
        adapted.add_adapter("second", copy.deepcopy(adapted.peft_config["default"]))
    assert key(adapted, adapter=ADAPTER_OFF) == original.key


def test_every_weight_of_an_adapter_counts(original, adapted):
    first = identify(adapted)
    assert changed_parts(original, first) == {"adapter"}
    assert first.weights != original.weights
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
            assert changed_parts(first, identify(adapted)) == {"adapter"}, name
            parameter.data -= 0.1


def test_the_base_is_not_moved_by_training_its_adapter(original):
    model = get_peft_model(helpers.make_model(), lora(modules_to_save=["lm_head"], use_dora=True))
    fresh = identify(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    tokens = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert key(model, adapter=ADAPTER_OFF) == original.key
    assert changed_parts(fresh, identify(model)) == {"adapter"}


def test_what_peft_sets_in_the_configuration_does_not_count():
    model = helpers.make_model(pretraining_tp=2)
    plain = key(model)
    model = get_peft_model(model, lora())
    assert model.config.pretraining_tp == 1
    assert key(model, adapter=ADAPTER_OFF) == plain


@pytest.mark.parametrize("config", [name for name in ADAPTERS if name != "virtual tokens"])
def test_the_name_of_an_adapter_does_not_count(config):
    model = with_adapter(copy.deepcopy(ADAPTERS[config]))
    alone = identify(model)
    add_copy(model, "_reference")
    assert identify(model).key == identify(model, adapter="_reference").key == alone.key
    for name, parameter in model.named_parameters():
        if "_reference" in name.split("."):
            parameter.data += 1.0
    assert key(model) == alone.key != key(model, adapter="_reference")
    model.set_adapter("_reference")
    assert key(model) == key(model, adapter="_reference")


def test_how_an_adapter_began_and_drops_out_does_not_count():
    model = with_adapter(lora(init_lora_weights="gaussian", lora_dropout=0.3))
    add_copy(model, "_reference", init_lora_weights=True, lora_dropout=0.0, inference_mode=True, revision="v2")
    assert key(model) == key(model, adapter="_reference")


SETTINGS = [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"fan_in_fan_out": True}]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_makes_an_adapters_function_counts(changes):
    model = with_adapter()
    add_copy(model, "second", **changes)
    first, second = identify(model), identify(model, adapter="second")
    assert changed_parts(first, second) == {"adapter"}
    ours, theirs = first.about["adapter"]["default"], second.about["adapter"]["second"]
    assert ours["weights"] == theirs["weights"] and ours["configuration"] != theirs["configuration"]


def test_a_scale_set_by_hand_counts():
    model = with_adapter()
    first = identify(model)
    model.get_base_model().model.layers[1].self_attn.q_proj.set_scale("default", 0.5)
    assert changed_parts(first, identify(model)) == {"adapter"}


def test_a_model_stands_with_the_adapters_that_are_on(original):
    model = with_adapter()
    on = identify(model)
    with model.disable_adapter():
        assert key(model) == original.key
        assert key(model, adapter="default") == on.key
    add_copy(model, "second", lora_alpha=16)
    assert identify(model).key == on.key
    model.base_model.set_adapter(["default", "second"])
    both = identify(model)
    assert len({both.key, on.key, key(model, adapter="second")}) == 3
    assert set(both.about["adapter"]) == {"default", "second"}


def test_adapters_that_transformers_put_in(original):
    """Without a PEFT model around it; the scale is in no weight and in no configuration of the model."""
    found = []
    for alpha in (8, 16):
        model = helpers.make_model()
        torch.manual_seed(0)
        model.add_adapter(lora(lora_alpha=alpha, init_lora_weights=False))
        found.append(identify(model))
        assert key(model, adapter=ADAPTER_OFF) == original.key
    assert changed_parts(*found) == {"adapter"}


def test_a_merged_adapter_is_refused():
    """The base it was merged into would have the key of a plain model with these weights."""
    model = with_adapter()
    before = identify(model)
    model.merge_adapter()
    for adapter in (None, ADAPTER_OFF):
        with pytest.raises(UserError, match="unmerge_adapter"):
            identify(model, adapter=adapter)
    model.unmerge_adapter()
    assert identify(model).about["adapter"] == before.about["adapter"]
    merged = with_adapter().merge_and_unload()
    assert identify(merged).about["adapter"] is None


def test_an_adapter_that_is_not_there():
    for model in (with_adapter(), helpers.make_model()):
        with pytest.raises(ValueError, match="no adapter called second"):
            identify(model, adapter="second")
    assert key(helpers.make_model(), adapter=ADAPTER_OFF) == key(helpers.make_model())
