"""Sampling by vLLM: against a stand-in that follows its protocol, and against vLLM itself where there is one."""

import json
import os
import sys
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.errors import RecipeError, UserError
from prefopt.generation import Sampling, generate, generate_to_disk, read_generations
from prefopt.generation.vllm_engine import PYTHON, VLLM, interpreter, worker_environment
from prefopt.procedures.rounds import RoundSettings
from prefopt.procedures.sampler import opened_vllm
from prefopt.recipe import load_recipe
from tests.helpers import make_tokenizer

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7"]
GREEDY = Sampling(max_new_tokens=6, temperature=0)
# Answers greedily by the model in the folder it is given, and writes down what it was asked.
STAND_IN = """
import json, os, torch
from transformers import AutoModelForCausalLM
__version__ = "0.0"
class SamplingParams:
    def __init__(self, **given):
        self.given = given
class Output:
    def __init__(self, ids):
        self.outputs = [self]
        self.token_ids = ids
class LLM:
    def __init__(self, **given):
        print("what libraries say")
        with open(os.environ["SEEN"], "a") as file:
            print(json.dumps({"given": given, "rank": os.environ.get("RANK")}), file=file)
        self.model = AutoModelForCausalLM.from_pretrained(given["model"])
    def generate(self, prompts, params, use_tqdm):
        with open(os.environ["SEEN"], "a") as file:
            print(json.dumps([one.given for one in params]), file=file)
        if os.environ.get("FAIL"):
            raise MemoryError("no room for the cache")
        return [self.answer(prompt["prompt_token_ids"], one.given) for prompt, one in zip(prompts, params)]
    def answer(self, ids, given):
        new = []
        while len(new) < given["max_tokens"] and not (new and new[-1] in given["stop_token_ids"]):
            with torch.no_grad():
                new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        return Output(new)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with heads of a size that vLLM has kernels for, in a folder, and its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=64,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer, folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An interpreter whose vLLM is the stand-in; the file it writes down what it was asked in."""
    (tmp_path / "vllm.py").write_text(STAND_IN)
    python = tmp_path / "python"
    # The isolation it is asked for would hide the stand-in.
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("RANK", "1")
    return tmp_path / "seen"


def test_its_answers_lie_on_disk_as_those_of_transformers_do(saved, stand_in, tmp_path):
    model, tokenizer, folder = saved
    with VLLM(str(folder), model, tokenizer, gpu_memory_utilization=0.5, max_model_len=None) as vllm:
        manifest = generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "a", GREEDY, shard_size=2, vllm=vllm)
    generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "b", GREEDY, shard_size=2)
    assert list(read_generations(tmp_path / "a")) == list(read_generations(tmp_path / "b"))
    assert manifest["facts"]["sampled_by"] == "vllm"
    started, first, second = map(json.loads, stand_in.read_text().splitlines())
    assert started["rank"] is None
    assert started["given"]["dtype"] == "float32" and started["given"]["gpu_memory_utilization"] == 0.5
    assert "max_model_len" not in started["given"]
    seeds = [one["seed"] for one in (*first, *second)]
    assert len(set(seeds)) == 3 and first[0]["stop_token_ids"] == [tokenizer.eos_token_id]


def test_answers_of_the_one_do_not_go_on_with_the_other(saved, stand_in, tmp_path):
    model, tokenizer, folder = saved
    generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "a", GREEDY)
    with VLLM(str(folder), model, tokenizer) as vllm, pytest.raises(UserError, match="sampled_by"):
        generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "a", GREEDY, vllm=vllm)


def test_it_does_not_start_where_nothing_is_missing(saved, stand_in, tmp_path):
    model, tokenizer, folder = saved
    for _ in range(2):
        with VLLM(str(folder), model, tokenizer) as vllm:
            generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "a", GREEDY, vllm=vllm)
    assert sum("given" in line for line in stand_in.read_text().splitlines()) == 1


def test_its_failure_comes_with_its_last_words(saved, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    model, tokenizer, folder = saved
    with VLLM(str(folder), model, tokenizer) as vllm, pytest.raises(UserError, match="no room for the cache"):
        generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "a", GREEDY, vllm=vllm)


@pytest.mark.parametrize(
    ("python", "said"), [(None, f"has no vLLM. .* {PYTHON}="), ("/nowhere/python", "/nowhere/python does not start")]
)
def test_an_interpreter_without_vllm_is_refused_at_once(python, said, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    if python:
        monkeypatch.setenv(PYTHON, python)
    with pytest.raises(UserError, match=said):
        interpreter()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_with_an_adapter_is_merged_for_as_long_as_it_is_needed(saved, stand_in, tmp_path, monkeypatch, fails):
    base, tokenizer, _ = saved
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(deepcopy(base), config)
    recipe = load_recipe("dpo").replace(model_name_or_path="adapter")
    settings = RoundSettings(use_vllm=True)
    if fails:
        monkeypatch.setenv("FAIL", "1")
    with (
        pytest.raises(UserError) if fails else nullcontext(),
        opened_vllm(recipe, settings, model, tokenizer, tmp_path / "answers") as vllm,
    ):
        assert not (tmp_path / "answers").exists()
        generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "answers" / "own", GREEDY, vllm=vllm)
    assert not list((tmp_path / "answers").glob("_*"))
    if not fails:
        own = generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0)
        assert [row["text"] for row in read_generations(tmp_path / "answers" / "own")] == [one.text for one in own]
        assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, LoraLayer)


def test_its_process_has_one_device_and_no_launcher():
    launched = {"RANK": "1", "MASTER_PORT": "29500", "ACCELERATE_X": "1", "HOME": "/h", "VLLM_LOGGING_LEVEL": "INFO"}
    own = worker_environment(launched, "3")
    assert own.pop("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    assert own == {"HOME": "/h", "VLLM_LOGGING_LEVEL": "INFO", "CUDA_VISIBLE_DEVICES": "3"}


@pytest.mark.parametrize(
    "given", [{"use_vllm": "yes"}, {"vllm_gpu_memory_utilization": 1.5}, {"vllm_max_model_length": 0}]
)
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(RecipeError, match=f"procedure.{next(iter(given))}"):
        RoundSettings(**given)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with vLLM")
def test_vllm_itself_draws_from_the_distribution_of_the_model(saved, tmp_path):
    model, tokenizer, folder = saved
    many, one = 4000, Sampling(4000, max_new_tokens=1, temperature=2.0, top_p=0.9)
    with VLLM(str(folder), model, tokenizer, max_model_len=128) as vllm:
        generate_to_disk(model, tokenizer, PROMPTS, tmp_path / "greedy", GREEDY, vllm=vllm)
        for name in ("first", "second"):
            generate_to_disk(model, tokenizer, PROMPTS[:1], tmp_path / name, one, shard_size=many, vllm=vllm)
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0)
    assert [row["text"] for row in read_generations(tmp_path / "greedy")] == [answer.text for answer in greedy]
    drawn, again = ([row["text"] for row in read_generations(tmp_path / name)] for name in ("first", "second"))
    assert drawn == again
    own = [answer.text for answer in generate(model, tokenizer, PROMPTS[:1], samples_per_prompt=many, max_new_tokens=1,
                                              temperature=2.0, top_p=0.9, batch_size=500)]  # fmt: skip
    shares = [{text: texts.count(text) / many for text in set(texts)} for texts in (drawn, own)]
    assert set(shares[0]) == set(shares[1]) and len(shares[0]) > 3
    for text in shares[0]:
        assert abs(shares[0][text] - shares[1][text]) < 4 * (shares[1][text] * 2 / many) ** 0.5 + 1e-3
