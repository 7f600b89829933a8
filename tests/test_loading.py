"""Batches reach the device as they were made, and in time; activations wait where the settings say."""

from __future__ import annotations

import pytest
import torch
from trl.models import activation_offloading

from prefopt.config import PreferenceConfig
from prefopt.data.collation import Collator
from prefopt.errors import UserError
from prefopt.loading import batch_loader, to_device
from tests.helpers import text_pairs
from tests.training import make_trainer


def test_a_batch_keeps_its_precision_numbers_and_shape():
    batch = {
        "ref_logp": torch.ones(3),
        "columns": {"weight": torch.ones(2, dtype=torch.float64)},
        "reading": {"padding": (2, 5)},
        "paired": True,
        "reference": torch.ones(2, 4, dtype=torch.bfloat16),
    }
    moved = to_device(batch, torch.device("meta"))
    assert moved["ref_logp"].dtype == torch.float32 and moved["columns"]["weight"].dtype == torch.float64
    assert moved["reference"].dtype == torch.bfloat16 and moved["ref_logp"].device.type == "meta"
    assert moved["reading"] == {"padding": (2, 5)} and moved["paired"] is True


def test_no_back_end_changes_the_precision_of_reference_scores(tmp_path):
    """The stock trainer casts floating-point inputs under DeepSpeed, which would round log-probabilities."""
    trainer = make_trainer(tmp_path, text_pairs(4))
    trainer.is_deepspeed_enabled = True
    try:
        assert trainer._prepare_inputs({"ref_logp": torch.ones(3)})["ref_logp"].dtype == torch.float32
    finally:
        trainer.is_deepspeed_enabled = False


def test_workers_make_all_micro_batches_of_a_step_ahead(tmp_path):
    def loader(**settings):
        args = PreferenceConfig(output_dir=str(tmp_path), report_to="none", **settings)
        return batch_loader(trainer.train_dataset, [[0]], Collator(), args)

    trainer = make_trainer(tmp_path, text_pairs(4))
    assert (loader().num_workers, loader().prefetch_factor) == (0, None)
    assert loader(dataloader_num_workers=1, gradient_accumulation_steps=5).prefetch_factor == 5
    assert loader(dataloader_num_workers=1, dataloader_prefetch_factor=3).prefetch_factor == 3


def test_activations_wait_elsewhere_in_training_steps_alone(tmp_path, monkeypatch):
    """On a device TRL's manager does it; what is seen here is where it is entered."""
    entered = []

    class Manager:
        def __init__(self, model, **kwargs):
            pass

        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(activation_offloading, "get_act_offloading_ctx_manager", Manager)
    monkeypatch.setattr(PreferenceConfig, "_check_devices", lambda self: None)
    trainer = make_trainer(tmp_path, text_pairs(8), per_device_train_batch_size=4, activation_offloading=True)
    trainer.train()
    trainer.evaluate(text_pairs(3))
    assert len(entered) == trainer.state.global_step == 2


def test_offloading_without_a_device_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="activation_offloading: there is no device here"):
        PreferenceConfig(output_dir=str(tmp_path), activation_offloading=True)
