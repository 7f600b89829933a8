"""The trainer against two others: TRL's on the same rows and weights, and the formula in float64 from plain logits.

A policy and a reference that differ, so that margins are not 0 and the loss is not ln 2.
"""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer

from prefopt.config import PreferenceConfig
from prefopt.scratch import train_tokenizer
from prefopt.trainer import PreferenceTrainer
from tests import helpers

BETA = 0.1
TOLERANCE = 1e-5
# Our name of a loss, TRL's name of it.
LOSSES = {"dpo": "sigmoid", "sft": "sft"}
MIXTURES = [(("dpo",), None), (("sft",), None), (("dpo", "sft"), [1.0, 0.5])]
ONE_STEP = {
    "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


def noisy(model, seed: int):
    """The model, now far enough from uniform that a wrong token, mask or sign shows in the first digits."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter)
    return model


def policy(tokenizer):
    return noisy(helpers.make_model(vocab_size=len(tokenizer)), 1)


def reference(tokenizer):
    return noisy(helpers.make_model(vocab_size=len(tokenizer)), 2)


@pytest.fixture(scope="module")
def text(tokenizer):
    """Plain text, answers of 2 to 10 words."""
    return tokenizer, helpers.text_pairs(8), 1024


@pytest.fixture(scope="module")
def real(shared_data):
    """Real conversations, hundreds of tokens each, and a tokenizer trained on them."""
    with open(shared_data / "judged_pairs_eval.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 8)]
    rows = [{part: row[part] for part in ("prompt", "chosen", "rejected")} for row in rows]
    texts = [message["content"] for row in rows for part in row.values() for message in part]
    return train_tokenizer(texts, 600, chat=True), rows, 1024


@pytest.fixture(scope="module")
def cut(real):
    """The same conversations with a limit that cuts the end of most answers, but no prompt."""
    tokenizer, rows, _ = real
    prompts = (tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows)
    return tokenizer, rows, max(map(len, prompts)) + 20


@pytest.fixture(params=["text", "cut"])
def data(request):
    return request.getfixturevalue(request.param)


def ours(data, folder, losses=("dpo",), weights=None, **settings):
    tokenizer, rows, limit = data
    needs_reference = "dpo" in losses
    args = PreferenceConfig(
        output_dir=str(folder / "ours"), max_length=limit, loss_weights=weights, activation_checkpointing=False,
        **{**ONE_STEP, **settings},
    )  # fmt: skip
    return PreferenceTrainer(
        policy(tokenizer),
        reference(tokenizer) if needs_reference else None,
        args,
        list(losses),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def theirs(data, folder, losses=("dpo",), weights=None):
    tokenizer, rows, limit = data
    args = DPOConfig(
        output_dir=str(folder / "theirs"), max_length=limit, loss_type=[LOSSES[loss] for loss in losses],
        loss_weights=weights, beta=BETA, gradient_checkpointing=False, **ONE_STEP,
    )  # fmt: skip
    return DPOTrainer(
        policy(tokenizer),
        reference(tokenizer),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def whole_batch(trainer):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def loss_and_gradients(trainer):
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def assert_equal(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    wrong = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    assert not {name: difference for name, difference in wrong.items() if not difference <= tolerance}


def test_token_rows_are_those_of_trl(data, tmp_path):
    """Equal ids and equal borders: without them no comparison below would mean anything."""
    mine, other = (make(data, tmp_path).train_dataset for make in (ours, theirs))
    limit = data[2]
    for row, expected in zip(mine, other, strict=True):
        for side in ("chosen", "rejected"):
            ids = [*row["prompt_ids"], *row[f"{side}_ids"]]
            assert ids == [*expected["prompt_ids"], *expected[f"{side}_ids"]][:limit]
            assert len(row["prompt_ids"]) == len(expected["prompt_ids"])
            assert all(row[f"{side}_scored"])


def test_the_limit_cuts_something(cut):
    tokenizer, rows, limit = cut
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    ]
    assert sum(length > limit for length in lengths) >= 4


@pytest.mark.parametrize(("losses", "weights"), MIXTURES)
def test_loss_and_every_gradient(data, losses, weights, tmp_path):
    found, gradients = loss_and_gradients(ours(data, tmp_path, losses, weights))
    expected, their_gradients = loss_and_gradients(theirs(data, tmp_path, losses, weights))
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert_equal(gradients, their_gradients)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1000 * TOLERANCE


def test_answers_of_a_thousand_tokens(real, tmp_path):
    """Sums of thousands of nats that differ by tens: what rounding leaves of the margin shows in every gradient."""
    found, gradients = loss_and_gradients(ours(real, tmp_path))
    expected, their_gradients = loss_and_gradients(theirs(real, tmp_path))
    largest = max(gradient.abs().max().item() for gradient in their_gradients.values())
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert_equal(gradients, their_gradients, TOLERANCE * largest)


@pytest.mark.parametrize(("losses", "weights"), [MIXTURES[0], MIXTURES[2]])
def test_one_step_and_its_log(data, losses, weights, tmp_path):
    mine, other = ours(data, tmp_path, losses, weights), theirs(data, tmp_path, losses, weights)
    mine.train()
    other.train()
    assert_equal(dict(mine.model.named_parameters()), dict(other.model.named_parameters()))
    found, expected = mine.state.log_history[0], other.state.log_history[0]
    assert found["num_tokens"] == expected["num_tokens"]
    compared = [
        "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "entropy",
    ]  # fmt: skip
    for name in compared:
        # Sums over hundreds of tokens: 1e-5 of a unit, or seven digits.
        assert found[name] == pytest.approx(expected[name], abs=TOLERANCE, rel=1e-6), name
    assert abs(found["rewards/margins"]) > 0.01


def test_evaluation_of_one_batch(data, tmp_path):
    """TRL's evaluation is exact as long as one batch holds all rows; ours always is."""
    rows = Dataset.from_list(data[1])
    mine = ours(data, tmp_path, per_device_eval_batch_size=3).evaluate(rows)
    expected = theirs(data, tmp_path).evaluate(rows)
    for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "entropy"):
        assert mine[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=TOLERANCE, rel=1e-6), name


# ---- the formula ----------------------------------------------------------------------------------------------------


def float64_model(seed, tokenizer):
    """GPT-2, because Llama's norms and positions compute in float32 whatever the weights are."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    return noisy(GPT2LMHeadModel(config).double(), seed).eval()


def answer_logps(model, row, side):
    """Log-probabilities of an answer's tokens `[m]`, from the model's own logits of the one sequence."""
    ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)[:-1]
    return logps.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]


def formula(model, ref, rows, dpo_weight, sft_weight):
    """Mean over pairs of -log S(beta h), and mean over all chosen tokens of -log pi, straight from the papers."""
    margins, chosen = [], []
    for row in rows:
        logps = {side: answer_logps(model, row, side) for side in ("chosen", "rejected")}
        ratios = {side: logps[side].sum() - answer_logps(ref, row, side).sum().detach() for side in logps}
        margins.append(ratios["chosen"] - ratios["rejected"])
        chosen.append(logps["chosen"])
    return -dpo_weight * logsigmoid(BETA * torch.stack(margins)).mean() - sft_weight * torch.cat(chosen).mean()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_float64_formula(text, weights, tmp_path):
    tokenizer, rows, _ = text
    trainer = PreferenceTrainer(
        float64_model(1, tokenizer),
        float64_model(2, tokenizer),
        PreferenceConfig(output_dir=str(tmp_path), loss_weights=list(weights), **ONE_STEP),
        ["dpo", "sft"],
        train_dataset=rows,
        processing_class=tokenizer,
    )
    loss, gradients = loss_and_gradients(trainer)
    plain = float64_model(1, tokenizer)
    expected = formula(plain, float64_model(2, tokenizer), trainer.train_dataset, *weights)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    assert_equal(gradients, {name: parameter.grad for name, parameter in plain.named_parameters()}, 1e-10)
