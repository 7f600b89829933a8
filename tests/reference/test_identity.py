"""A key names a function: whatever changes the function changes it, and nothing else does."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import random
import subprocess
import sys
from abc import ABC
from datetime import timedelta
from pathlib import Path
from typing import Generic, TypeVar

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import PartialState
from peft import get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from prefopt.errors import UserError
from prefopt.models import silence_dropout
from prefopt.reference import hashing
from prefopt.reference.identity import ADAPTER_OFF, identify
from prefopt.scoring.model import enable_scoring
from tests import helpers
from tests.reference.identities import ADAPTERS, add_copy, changed_parts, key, lora, with_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original():
    return identify(helpers.make_model())


# ---- what changes the function ------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "rope base": {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
    "rope scaling": {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}},
    "norm eps": {"rms_norm_eps": 1e-5},
    "soft cap": {"final_logit_softcapping": 30.0},
    "logit scale": {"logit_scale": 0.5},
    "sliding window": {"sliding_window": 8},
    "activation": {"hidden_act": "gelu"},
    "a part's eps": {"text_config": LlamaConfig(rms_norm_eps=1e-5)},
    "a field nobody knows": {"brand_new": 3},
    "dropped tokens": {"num_dropped_layers": 1},
}


@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_a_number_of_the_configuration_counts_with_equal_weights(original, change):
    model = helpers.make_model()
    for name, value in CONFIGURATIONS[change].items():
        setattr(model.config, name, value)
    found = identify(model)
    assert found.weights == original.weights
    assert changed_parts(original, found) == {"configuration"}


def test_models_built_with_another_rope_base_differ(original):
    """Where a file holds the default base and another one is given, equal weights are another function."""
    found = identify(helpers.make_model(rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"}))
    assert changed_parts(original, found) == {"configuration"}


def test_one_weight_counts(original):
    names = [name for name, _ in helpers.make_model().named_parameters()]
    keys = set()
    for name in names:
        model = helpers.make_model()
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(torch.inf))
        found = identify(model)
        assert changed_parts(original, found) == {"weights"}, name
        assert found.weights != original.weights
        keys.add(found.key)
    assert len(keys) == len(names)


def test_weights_that_change_places_count(original):
    model = helpers.make_model()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight, second.weight = second.weight, first.weight
    assert changed_parts(original, identify(model)) == {"weights"}


def test_saved_buffers_count(original):
    model = helpers.make_model()
    model.model.register_buffer("shift", torch.zeros(3))
    first = identify(model)
    model.model.shift += 1
    assert changed_parts(original, first) == changed_parts(first, identify(model)) == {"weights"}


class Quantized(torch.nn.Linear):
    """As bitsandbytes keeps its scales: in no parameter and no buffer, and yet in what is saved."""

    scale = 2.0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = torch.tensor(self.scale)


def test_what_a_quantized_layer_saves_counts():
    model = helpers.make_model()
    model.model.layers[0].mlp.up_proj = Quantized(32, 64, bias=False)
    first = identify(model)
    model.model.layers[0].mlp.up_proj.scale = 3.0
    second = identify(model)
    assert changed_parts(first, second) == {"weights"}
    model = get_peft_model(model, lora(target_modules=["up_proj"]))
    assert key(model, adapter=ADAPTER_OFF) == second.key


def test_the_dtype_of_the_weights_counts(original):
    keys = {original.key}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = identify(helpers.make_model(dtype=dtype))
        assert {"weights", "precision"} <= changed_parts(original, found)
        keys.add(found.key)
    assert len(keys) == 4


def test_the_dtype_of_autocast_counts(original):
    found = {dtype: identify(helpers.make_model(), compute_dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    assert all(changed_parts(original, identity) == {"precision"} for identity in found.values())
    assert len({identity.key for identity in found.values()}) == 2


def test_rotary_frequencies_cast_with_the_model_count(tmp_path):
    """`model.to(bfloat16)` rounds them; a model loaded in bfloat16 keeps them in float32."""
    cast = helpers.make_model(dtype=torch.bfloat16)
    cast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    first, second = cast.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq
    assert not torch.equal(first.float(), second)
    assert changed_parts(identify(cast), identify(loaded)) == {"precision"}


def test_a_grown_vocabulary_counts(original):
    model = helpers.make_model()
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert changed_parts(original, identify(model)) == {"weights", "configuration"}


# ---- code ---------------------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaForCausalLM

class Squashed(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.tanh() * {factor}
        return output
"""


@pytest.fixture
def own_class(tmp_path, monkeypatch):
    """A class of the user's, in a file that may lie in any folder."""

    def make(folder, factor=1):
        path = tmp_path / folder / "modeling.py"
        path.parent.mkdir()
        path.write_text(CODE.format(factor=factor))
        spec = importlib.util.spec_from_file_location(f"transformers_modules.{folder}.modeling", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module.Squashed

    return make


def of_class(kind):
    model = kind(helpers.make_model().config)
    model.load_state_dict(helpers.make_model().state_dict())
    return identify(model)


def test_the_class_counts(original, own_class):
    assert changed_parts(original, of_class(own_class("a"))) == {"code"}


def test_the_source_of_a_class_counts_and_its_place_does_not(own_class):
    first = of_class(own_class("a"))
    assert changed_parts(first, of_class(own_class("b"))) == set()
    assert changed_parts(first, of_class(own_class("c", factor=2))) == {"code"}


class OwnNorm(torch.nn.Identity, Generic[TypeVar("T")], ABC):
    """Here only so that its source is this file."""


def test_the_source_of_a_part_counts(original):
    model = helpers.make_model()
    model.model.norm = OwnNorm()
    model.model.norm.register_parameter("weight", helpers.make_model().model.norm.weight)
    found = identify(model)
    assert changed_parts(original, found) == {"code"}
    assert found.about["parts"]["code"]["sources"] == [hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]


def test_the_source_of_a_library_does_not_count(original):
    assert original.about["parts"]["code"]["sources"] == []
    assert original.about["class"] == "transformers.models.llama.modeling_llama.LlamaForCausalLM"


# ---- what does not ------------------------------------------------------------------------------------------------


def eager(model):
    model.set_attn_implementation("eager")


def dropout(model):
    model.config.attention_dropout = 0.3
    model.config.resid_pdrop = 0


def names(model):
    model.config._name_or_path = model.name_or_path = "somewhere/else"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.transformers_version = "4.0.0"


def other_ids(model):
    model.config.pad_token_id = model.config.eos_token_id = model.generation_config.pad_token_id = 7


def as_in_training(model):
    enable_scoring(model)
    silence_dropout(model)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    model.config.dtype = torch.bfloat16


def without_grad(model):
    model.requires_grad_(False)


def a_field_not_set(model):
    model.config.from_a_later_release = None


SAME = [eager, dropout, names, other_ids, as_in_training, without_grad, a_field_not_set]


@pytest.mark.parametrize("change", SAME)
def test_what_is_not_the_function_does_not_count(original, change):
    model = helpers.make_model()
    change(model)
    assert changed_parts(original, identify(model)) == set()


def test_what_does_not_count_does_not_count_in_a_part_either():
    first, second = helpers.make_model(), helpers.make_model()
    first.config.draft, second.config.draft = LlamaConfig(), LlamaConfig(pad_token_id=5)
    second.config.draft._name_or_path = "elsewhere"
    assert key(first) == key(second)


def test_the_mode_does_not_count_and_nothing_is_touched(original):
    model = helpers.make_model(attention_dropout=0.3).train()
    model.model.eval()
    modes = [module.training for module in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    assert key(model) == original.key
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(numpy.random.get_state()))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_saved_and_loaded_is_the_same(tied, tmp_path):
    model = helpers.make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert key(loaded) == key(model)


def test_tied_weights_are_as_good_as_equal_ones():
    """Some ways of saving and sharding give the one weight twice."""
    tied, apart = helpers.make_model(tie_word_embeddings=True), helpers.make_model(tie_word_embeddings=True)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    assert key(tied) == key(apart)
    assert identify(apart).about["parameters"] > identify(tied).about["parameters"]
    with torch.no_grad():
        apart.lm_head.weight[0, 0] += 1
    assert key(tied) != key(apart)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrappers_do_not_count(original, one_process):
    model = helpers.make_model()
    assert key(torch.nn.parallel.DistributedDataParallel(model)) == original.key
    assert key(torch.compile(model)) == original.key
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert key(torch.nn.parallel.DistributedDataParallel(model)) == original.key


def test_fsdp_changes_the_class_and_not_the_key(original, one_process):
    model = helpers.make_model()
    fully_shard(model.lm_head)
    fully_shard(model)
    assert type(model).__name__ != "LlamaForCausalLM"
    assert changed_parts(original, identify(model)) == set()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_fsdp_1_is_refused(one_process):
    model = FullyShardedDataParallel(helpers.make_model(), device_id=torch.device("cpu"))
    with pytest.raises(UserError, match="fsdp_version: 2"):
        identify(model)


# ---- for people ---------------------------------------------------------------------------------------------------


def test_what_people_read(tmp_path):
    model = helpers.make_model()
    model.save_pretrained(tmp_path / "start")
    model = with_adapter(model=AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
    about = identify(model, compute_dtype=torch.bfloat16).about
    assert about["name"] == str(tmp_path / "start")
    assert (about["dtype"], about["compute_dtype"], about["device"]) == ("float32", "bfloat16", "cpu")
    assert about["attention"] == "sdpa"
    assert about["versions"]["torch"] == torch.__version__
    assert about["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert about["adapter"]["default"]["configuration"]["r"] == 4
    assert about == hashing.plain(about)


# ---- other processes ----------------------------------------------------------------------------------------------

PRINT_KEYS = """
from tests.reference.test_identity import ADAPTERS, CODE, helpers, key, of_class, with_adapter
print(key(helpers.make_model()), key(with_adapter(ADAPTERS["every layer"])))
for words in ({"b", "a", "c"}, {"b", "a", "c", "d"}):
    exec(CODE.format(factor="len(words)"))
    print(of_class(Squashed).key)
"""


def printed(seed):
    """The keys that a process finds whose sets are in an order of its own; two of them of classes typed into it."""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable], input=PRINT_KEYS, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_another_process_finds_the_same_keys(original):
    found = printed(1)
    assert found[:2] == [original.key, key(with_adapter(copy.deepcopy(ADAPTERS["every layer"])))]
    assert len(set(found)) == 4
    assert printed(2) == found


def worker(rank, store, expected):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    assert PartialState(cpu=True).is_main_process == (rank == 0)
    for tied in (False, True):
        model = helpers.make_model(tie_word_embeddings=tied)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert model.lm_head.weight.to_local().numel() < model.lm_head.weight.numel()
        assert key(model) == expected[f"tied {tied}"]
    model = with_adapter()
    add_copy(model, "_reference")
    fully_shard(model.get_base_model().model.layers[0])
    fully_shard(model)
    assert key(model, adapter="_reference") == key(model) == expected["adapter"]
    assert key(model, adapter=ADAPTER_OFF) == expected["tied False"]
    only_here = helpers.make_model() if rank == 0 else helpers.make_model(seed=5).to("meta")
    assert key(only_here) == expected["tied False"]
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_key_of_one(tmp_path):
    """Sharded, and with weights that only the main process has loaded."""
    expected = {f"tied {tied}": key(helpers.make_model(tie_word_embeddings=tied)) for tied in (False, True)}
    expected["adapter"] = key(with_adapter())
    multiprocessing.spawn(worker, args=(str(tmp_path / "store"), expected), nprocs=2)
