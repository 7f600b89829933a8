"""Which layout a run reads its rows in, and that the run does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from prefopt.errors import UserError
from prefopt.layouts import choose_layout, is_shared
from tests.helpers import make_model, make_tokenizer, text_pairs
from tests.scoring.families import build
from tests.scoring.test_attention import GPT_NEO, LFM2
from tests.training import make_trainer, trained, weights

VOCABULARY = len(make_tokenizer())
LONG = [{**row, "prompt": row["prompt"] * 4} for row in text_pairs(10)]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row layout")]
    assert len(lines) == 1
    return lines[0]


def test_auto_shares_prompts_where_that_saves_work(tmp_path, capsys):
    trainer = make_trainer(tmp_path, LONG)
    assert is_shared(trainer.data_collator)
    plain, unique = trainer.train_dataset.lengths, trainer.train_dataset.widths(shared=True)
    assert f"saves {1 - sum(unique) / sum(plain):.0%} of the tokens" in said(capsys)


def test_auto_stays_plain_where_nothing_is_shared(tmp_path, capsys):
    assert not is_shared(make_trainer(tmp_path, LONG, loss="sft").data_collator)  # it reads one answer of a pair
    assert "would save 0% of the work" in said(capsys)
    answers = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in LONG]
    assert not is_shared(make_trainer(tmp_path, answers, loss="sft").data_collator)


def test_auto_stays_plain_where_it_would_take_longer(tmp_path, capsys):
    """One token is shared, and attention over two long answers in one row costs more than over each."""
    rows = [{"prompt": "a", "chosen": " cat" * (150 + n), "rejected": " sat" * (150 + n)} for n in range(4)]
    assert not is_shared(make_trainer(tmp_path, rows).data_collator)
    assert "would save 0% of the work" in said(capsys)


def model_that_cannot(kind: str) -> Any:
    return build(kind, **{**(LFM2 if kind == "lfm2" else {}), "vocab_size": VOCABULARY})


@pytest.mark.parametrize(
    ("kind", "reason"), [("lfm2", "carry a state"), ("falcon_h1", "carry a state"), ("mpt", "nats a token")]
)
def test_models_that_cannot_share_fall_back_or_are_refused(tmp_path, capsys, kind, reason):
    long_enough = {"max_length": 64}
    trainer = make_trainer(tmp_path, LONG, model=model_that_cannot(kind), reference=False, **long_enough)
    assert not is_shared(trainer.data_collator)
    assert reason in said(capsys)
    with pytest.raises(UserError, match=f"{reason}.*row_layout: plain"):
        make_trainer(tmp_path, LONG, model=model_that_cannot(kind), row_layout="shared", reference=False, **long_enough)


def test_the_longest_row_is_tried(tmp_path, capsys):
    """A window inside the model shows only in rows that are longer than it."""
    model = build("gpt_neo", **{**GPT_NEO, "vocab_size": VOCABULARY, "window_size": 40})
    rows = [*text_pairs(6), LONG[0]]
    trainer = make_trainer(tmp_path, rows, model=model, reference=False, max_length=64)
    assert [width > 40 for width in trainer.train_dataset.widths(shared=True)] == [False] * 6 + [True]
    assert not is_shared(trainer.data_collator)
    assert "nats a token" in said(capsys)


def test_a_reference_that_cannot_share_counts_as_well(tmp_path, capsys):
    live = {"reference": model_that_cannot("lfm2"), "reference_block": {"source": "live"}}
    assert not is_shared(make_trainer(tmp_path, LONG, **live).data_collator)
    assert "Lfm2ForCausalLM cannot share prompts" in said(capsys)


def test_dropout_keeps_rows_plain_unless_sharing_is_asked_for(tmp_path, capsys):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    assert not is_shared(make_trainer(tmp_path, LONG, peft_config=adapter).data_collator)
    assert "dropout" in said(capsys)
    assert is_shared(make_trainer(tmp_path, LONG, peft_config=adapter, row_layout="shared").data_collator)
    assert "the same dropout" in said(capsys)
    keeps = {"model": make_model(vocab_size=VOCABULARY, attention_dropout=0.1), "disable_dropout": False}
    assert not is_shared(make_trainer(tmp_path, LONG, **keeps).data_collator)


def test_plain_is_plain_and_an_own_collator_is_left_alone(tmp_path):
    assert not is_shared(make_trainer(tmp_path, LONG, row_layout="plain").data_collator)
    trainer = make_trainer(tmp_path, LONG, row_layout="plain")
    trainer.args.row_layout = "auto"
    own: dict[str, Any] = {"loss": "dpo", "train_dataset": LONG, "processing_class": trainer.processing_class}
    own["data_collator"] = trainer.data_collator
    assert not is_shared(type(trainer)(make_model(vocab_size=VOCABULARY), args=trainer.args, **own).data_collator)
    trainer.args.row_layout = "shared"
    with pytest.raises(UserError, match="data_collator lays the rows out itself"):
        type(trainer)(make_model(vocab_size=VOCABULARY), args=trainer.args, **own)


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_checkpointing": True},
        {"peft_config": LORA, "activation_checkpointing": True},
        {"loss": "kto"},
        {"reference": False, "reference_block": {"source": "live"}},
    ],
    ids=["plain", "checkpointing", "lora", "kto", "live"],
)
def test_a_run_does_not_notice_its_layout(tmp_path, settings):
    ends, logs = [], []
    for layout in ("plain", "shared"):
        trainer = make_trainer(
            tmp_path,
            [*LONG, {**LONG[0], "chosen": " a cat"}],  # two rows of one prompt
            row_layout=layout,
            train_sampling_strategy="random",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            **settings,
        )
        trainer.train()
        ends.append(weights(trainer.model))
        logs.append(trainer.state.log_history[:-1])
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=0)
    for plain, shared in zip(*logs, strict=True):
        # At the first step margins are 0 but for rounding, and an accuracy reads their sign.
        for name in plain.keys() - {"padding", "unique_tokens", "rewards/accuracies"}:
            assert shared[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-5), name


def test_half_precision_keeps_the_layouts_together(tmp_path):
    ends = [trained(tmp_path, LONG, row_layout=way, bf16=True) for way in ("plain", "shared")]
    torch.testing.assert_close(ends[1], ends[0], atol=2e-3, rtol=0)


def test_padding_and_unique_tokens_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, LONG, logging_steps=3, per_device_train_batch_size=4)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    log = trainer.state.log_history[-2]
    held = sum(int((batch["branch"] >= 0).sum()) for batch in batches)
    assert log["padding"] == pytest.approx(1 - held / sum(batch["branch"].numel() for batch in batches))
    assert log["unique_tokens"] == held / len(LONG)
    assert log["num_tokens"] == sum(trainer.train_dataset.lengths)


def test_evaluation_is_the_same_in_both_layouts(tmp_path):
    figures = [
        make_trainer(tmp_path, LONG, eval_rows=text_pairs(7, seed=5), row_layout=way).evaluate()
        for way in ("plain", "shared")
    ]
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_logps/rejected"):
        assert figures[1][name] == pytest.approx(figures[0][name], abs=2e-6, rel=1e-6)


def test_a_resumed_run_keeps_its_layout(tmp_path, monkeypatch):
    """Rows are grouped by what the layout makes of them, so another layout is another order."""
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    make_trainer(tmp_path, LONG, **settings).train()
    monkeypatch.setattr("prefopt.layouts._WORTH", 0.99)
    with pytest.raises(UserError, match="\n  layout: shared in the checkpoint, plain now"):
        make_trainer(tmp_path, LONG, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_rows_are_grouped_by_what_the_layout_makes_of_them(tmp_path, layout):
    trainer = make_trainer(tmp_path, LONG, row_layout=layout)
    widths = trainer.train_dataset.widths(shared=layout == "shared")
    assert trainer.get_train_dataloader().batch_sampler.lengths.tolist() == widths


@pytest.mark.parametrize(("kernel", "masked"), [("sdpa", False), ("eager", False), ("flash_attention_2", True)])
def test_plain_rows_have_a_mask_where_the_kernel_skips_padding(tmp_path, monkeypatch, kernel, masked):
    trainer = make_trainer(tmp_path, text_pairs(4), row_layout="plain")
    monkeypatch.setattr(trainer.model.config, "_attn_implementation_internal", kernel)
    choose_layout(trainer, own_collator=False)
    assert ("attention_mask" in trainer.data_collator(list(trainer.train_dataset.rows))) is masked
