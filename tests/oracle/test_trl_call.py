"""What works with TRL's DPOTrainer works here with one import and one argument changed."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from prefopt.config import PreferenceConfig
from prefopt.data.collation import Collator
from prefopt.errors import UserError
from prefopt.models import load_model, load_tokenizer
from prefopt.trainer import PreferenceTrainer
from tests import helpers

SHORT = {
    "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip

# TRL's metrics that are not ours, and why.
LEFT_OUT = {
    "logits/chosen": "any number added to all logits changes this mean and nothing else",
    "logits/rejected": "as for the chosen",
    "mean_token_accuracy": "an argmax over the vocabulary at every position, for a figure about the chosen side alone",
    "eval_logits/chosen": "as in training",
    "eval_logits/rejected": "as in training",
    "eval_mean_token_accuracy": "as in training",
    "eval_num_tokens": "the tokens trained on so far, which an evaluation does not change",
}

# TRL's settings that are not fields of our configuration, and where they went.
SETTINGS_ELSEWHERE = {
    "beta": "a knob of the loss",
    "discopop_tau": "a knob of the loss",
    "f_alpha_divergence_coef": "a knob of the loss",
    "f_divergence_type": "a knob of the loss",
    "label_smoothing": "a knob of the losses that read it",
    "ld_alpha": "a knob of the loss",
    "loss_type": "the argument `loss`",
    "pad_token": "an attribute of the tokenizer",
    "padding_free": "off in TRL too",
    "precompute_ref_batch_size": "`reference`",
    "precompute_ref_log_probs": "`reference`",
    "ref_model_mixup_alpha": "not supported",
    "ref_model_sync_steps": "not supported",
    "router_aux_loss_coef": "not supported",
    "sync_ref_model": "not supported",
    "trust_remote_code": "`model_init_kwargs`",
    "use_weighting": "not supported",
}


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A model and its tokenizer on disk."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path):
    """A data set as it comes from disk."""
    Dataset.from_list(helpers.text_pairs(6)).save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(tmp_path / "rows")


def config(tmp_path, **settings):
    return PreferenceConfig(output_dir=str(tmp_path / "out"), **{**SHORT, **settings})


def moved(trainer, before):
    """Names of the weights that are not what they were."""
    return {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}


def documented_call():
    """The example in the docstring of TRL's class, as code."""
    code = "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) ?(.*)$", DPOTrainer.__doc__, re.MULTILINE))
    assert "from trl import DPOTrainer\n" in code and "trainer.train()" in code
    return code


def test_the_documented_call(folder, model, rows, tmp_path, monkeypatch):
    """Changed: the import and the model's name. The data set's name is answered with rows from disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    code = documented_call().replace("trl import DPOTrainer", "prefopt import PreferenceTrainer as DPOTrainer")
    code, changed = re.subn(r'model="[^"]+"', f'model="{folder}"', code)
    assert changed == 1
    names: dict = {}
    exec(code, names)
    trainer = names["trainer"]
    assert isinstance(trainer, PreferenceTrainer)
    assert trainer.state.global_step == 3  # three epochs of one batch of eight
    assert moved(trainer, model.state_dict())


def test_the_call_with_a_configuration(folder, rows, tmp_path):
    """As in TRL's guide: a configuration with TRL's names, a loaded model, the tokenizer, both data sets."""
    args = config(tmp_path, learning_rate=1e-3, max_length=64, disable_dropout=True, pad_to_multiple_of=8,
                  gradient_checkpointing=True, eval_strategy="steps", eval_steps=1)  # fmt: skip
    trainer = PreferenceTrainer(
        model=load_model(str(folder)),
        args=args,
        processing_class=load_tokenizer(str(folder)),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
    )
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"loss", "eval_loss", "eval_rewards/accuracies"} <= logged


def test_every_parameter_of_the_constructor_exists():
    theirs = inspect.signature(DPOTrainer.__init__).parameters
    ours = inspect.signature(PreferenceTrainer.__init__).parameters
    assert set(ours) - set(theirs) == {"loss"}
    assert set(theirs) <= set(ours)
    assert list(ours)[:4] == list(theirs)[:4]  # self, model, ref_model, args: what is given by position
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_every_parameter_of_the_constructor_is_used(model, tokenizer, rows, tmp_path):
    seen, callback = [], CountSteps()
    collator = Collator(pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = PreferenceTrainer(
        model=model,
        ref_model=helpers.make_model(3, vocab_size=len(tokenizer)),
        args=config(tmp_path),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset={"first": rows.select(range(2)), "rest": rows.select(range(2, 6))},
        processing_class=tokenizer,
        compute_metrics=lambda prediction: seen.append(prediction) or {"pairs": float(len(prediction.predictions))},
        callbacks=[callback],
        optimizers=(optimizer, schedule),
        peft_config=None,
        quantization_config=None,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.data_collator is collator
    assert trainer.optimizer.optimizer is optimizer
    assert callback.steps == 2
    assert [len(prediction.predictions) for prediction in seen] == [2, 4]
    assert metrics["eval_first_pairs"] == 2 and metrics["eval_rest_pairs"] == 4
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 0


def test_peft_config_trains_the_adapter_alone(folder, rows, tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    trainer = PreferenceTrainer(model=str(folder), args=config(tmp_path, learning_rate=0.1), train_dataset=rows,
                                peft_config=adapter)  # fmt: skip
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = moved(trainer, before)
    assert changed and all("lora_" in name for name in changed)


def test_a_quantization_config_needs_a_name(model, tokenizer, rows, tmp_path):
    with pytest.raises(UserError, match="quantization_config"):
        PreferenceTrainer(model, args=config(tmp_path), train_dataset=rows, processing_class=tokenizer,
                          quantization_config=object())  # fmt: skip


def test_metrics_have_the_names_of_trl(model, tokenizer, rows, tmp_path):
    args = DPOConfig(output_dir=str(tmp_path / "trl"), gradient_checkpointing=False, **SHORT)
    given = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    reference = helpers.make_model(1, vocab_size=len(tokenizer))
    theirs = DPOTrainer(helpers.make_model(vocab_size=len(tokenizer)), reference, args, **given)
    ours = PreferenceTrainer(model, helpers.make_model(1, vocab_size=len(tokenizer)), config(tmp_path), **given)
    logged = []
    for trainer in (theirs, ours):
        trainer.train()
        trainer.evaluate()
        logged.append({name for line in trainer.state.log_history for name in line})
    expected, found = logged
    assert {"rewards/chosen", "logps/rejected", "entropy", "num_tokens", "eval_rewards/margins"} <= expected
    assert expected - found == set(LEFT_OUT)


def test_settings_keep_their_names_and_defaults():
    """A field of TRL's configuration is a field here, or listed above; one with the same name has the same default."""
    inherited = {field.name for field in fields(TrainingArguments)}
    ours = {field.name: field.default for field in fields(PreferenceConfig)}
    theirs = {field.name: field.default for field in fields(DPOConfig) if field.name not in inherited}
    assert set(theirs) - set(ours) == set(SETTINGS_ELSEWHERE)
    # TRL's "auto" pads on one kind of device alone.
    shared = {name: default for name, default in theirs.items() if name in ours and name != "pad_to_multiple_of"}
    assert {name: ours[name] for name in shared} == shared
    assert ours["learning_rate"] == next(field.default for field in fields(DPOConfig) if field.name == "learning_rate")
