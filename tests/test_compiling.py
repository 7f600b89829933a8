"""`torch_compile`: the same steps, the same names in checkpoints, and not a graph for every new shape."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from tests.helpers import text_pairs
from tests.training import make_trainer, weights

SETTINGS = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")


@pytest.fixture(autouse=True)
def no_graphs_before():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(folder, **settings):
    trainer = make_trainer(folder, text_pairs(24), learning_rate=0.05, per_device_train_batch_size=4, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"row_layout": "plain", "activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"peft_config": LORA}, marks=pytest.mark.slow),
        pytest.param(
            {"loss": "tdpo2", "reference": False, "reference_block": {"source": "live"}}, marks=pytest.mark.slow
        ),
    ],
)
def test_compiled_blocks_make_the_same_steps(tmp_path, settings):
    eager = weights(trained(tmp_path / "eager", **settings).model)
    assert not counters["stats"]
    compiled = weights(trained(tmp_path / "compiled", **settings, **SETTINGS).model)
    assert (eager - compiled).abs().max() < 1e-6
    assert counters["stats"]["unique_graphs"] > 0


def test_new_lengths_and_numbers_of_tokens_make_no_new_graphs(tmp_path):
    """Six steps, every one of another shape: as many graphs as two steps make."""
    trained(tmp_path / "short", max_steps=2, **SETTINGS)
    few = counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    counters.clear()
    trained(tmp_path / "long", **SETTINGS)
    assert counters["stats"]["unique_graphs"] == few


def test_a_compiled_model_is_saved_under_the_same_names(tmp_path):
    trained(tmp_path / "eager").save_model()
    trained(tmp_path / "compiled", **SETTINGS).save_model()
    names = [load_file(tmp_path / run / "model.safetensors").keys() for run in ("eager", "compiled")]
    assert names[0] == names[1]
