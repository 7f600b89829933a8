"""A run goes on with the reference it began with, or says what is not the same."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.errors import UserError
from prefopt.reference.identity import ADAPTER_OFF, identify
from prefopt.reference.record import check_reference, record_reference
from tests import helpers


def lora(**settings):
    model = get_peft_model(
        helpers.make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def run(tmp_path):
    """The folder of a run that began with the plain model."""
    record_reference(tmp_path / "run", identify(helpers.make_model()), "live: a frozen copy of the starting policy")
    return tmp_path / "run"


def test_what_is_written(run):
    record = json.loads((run / "reference.json").read_text())
    identity = identify(helpers.make_model())
    assert set(record) == {"version", "key", "weights", "source", "about", "seal"}
    assert (record["version"], record["key"], record["weights"]) == (1, identity.key, identity.weights)
    assert record["source"] == "live: a frozen copy of the starting policy"
    assert record["about"] == identity.about
    assert [path.name for path in run.iterdir()] == ["reference.json"]


def test_the_same_function_goes_on(run):
    check_reference(run, identify(helpers.make_model()))
    check_reference(run, identify(lora(), adapter=ADAPTER_OFF))
    renamed = helpers.make_model()
    renamed.config._name_or_path = "elsewhere"
    renamed.set_attn_implementation("eager")
    check_reference(run, identify(renamed))


def test_an_older_run_has_no_record(tmp_path):
    check_reference(tmp_path, identify(helpers.make_model()))
    check_reference(tmp_path / "not there", identify(helpers.make_model()))


def test_a_record_is_replaced_by_the_next_run(run):
    other = identify(helpers.make_model(seed=1))
    record_reference(run, other, "live: the model given")
    check_reference(run, other)


def half(**options):
    return identify(helpers.make_model(), compute_dtype=torch.bfloat16, **options)


OTHERS = {
    "weights": (lambda: identify(helpers.make_model(seed=1)), "weights."),
    "configuration": (
        lambda: identify(helpers.make_model(rms_norm_eps=1e-5, rope_parameters={"rope_theta": 5e5})),
        "configuration (rms_norm_eps: 1e-06 then, 1e-05 now, rope_parameters.rope_theta: 10000.0 then, 500000.0 now).",
    ),
    "soft cap": (
        lambda: identify(helpers.make_model(final_logit_softcapping=30.0)),
        "configuration (final_logit_softcapping: None then, 30.0 now, logits: [1.0, None] then, [1.0, 30.0] now).",
    ),
    "compute dtype": (half, "precision (compute: None then, 'bfloat16' now)."),
    "dtype": (
        lambda: identify(helpers.make_model(dtype=torch.float64)),
        "weights; precision (unsaved_buffers: ['float32'] then, ['float64'] now, "
        "weights: ['float32'] then, ['float64'] now).",
    ),
    "adapter": (lambda: identify(lora()), "adapter (none then, one now)."),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_function_is_refused_with_what_differs(run, kind):
    make, difference = OTHERS[kind]
    with pytest.raises(UserError) as error:
        check_reference(run, make())
    message = str(error.value)
    assert f"{run / 'reference.json'}: " in message and f"Not the same: {difference} Start" in message
    for way_out in ("the model that it began with", "`reference.model`", "output_dir"):
        assert way_out in message


def test_what_differs_in_an_adapter(tmp_path):
    record_reference(tmp_path, identify(lora(lora_alpha=8)), "live")
    with pytest.raises(UserError, match=r"same: adapter \(scaling, lora_alpha: 8 then, 16 now\)\. "):
        check_reference(tmp_path, identify(lora(lora_alpha=16)))
    moved = lora(lora_alpha=8)
    next(p for p in moved.parameters() if p.requires_grad).data += 1
    with pytest.raises(UserError, match=r"same: adapter \(weights\)\. "):
        check_reference(tmp_path, identify(moved))
    with pytest.raises(UserError, match=r"same: adapter \(one then, none now\)\. "):
        check_reference(tmp_path, identify(helpers.make_model()))


def test_another_class_is_named(run):
    class Own(type(helpers.make_model())):
        pass

    model = Own(helpers.make_model().config)
    model.load_state_dict(helpers.make_model().state_dict())
    with pytest.raises(UserError, match=r"same: code \(class: '.*LlamaForCausalLM' then, '.*Own' now\)\. "):
        check_reference(run, identify(model))


def test_every_damaged_bit_is_found(run):
    path, identity = run / "reference.json", identify(helpers.make_model())
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(len(whole) * 8), 200):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"reference\.json is damaged"):
            check_reference(run, identity)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"seal": "x"}', "[" * 100_000, "\0\xff"])
def test_a_file_that_is_no_record_is_damaged(run, text):
    (run / "reference.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"reference\.json is damaged.* delete the file"):
        check_reference(run, identify(helpers.make_model()))


def test_a_folder_in_its_place_is_damage_too(run):
    (run / "reference.json").unlink()
    (run / "reference.json").mkdir()
    with pytest.raises(UserError, match="damaged"):
        check_reference(run, identify(helpers.make_model()))


def test_a_record_of_a_later_version(run, monkeypatch):
    monkeypatch.setattr("prefopt.reference.record.VERSION", 2)
    with pytest.raises(UserError, match=r"has version 1, and this prefopt reads version 2"):
        check_reference(run, identify(helpers.make_model()))
