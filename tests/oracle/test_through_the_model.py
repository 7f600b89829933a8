"""The whole trainer in float64 against the formula, fed with the model's own logits of one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt.config import PreferenceConfig
from prefopt.losses import Objective, make
from prefopt.reference.live import NoReference
from prefopt.trainer import PreferenceTrainer
from tests.oracle import float64
from tests.oracle.float64 import Answer, Pair
from tests.oracle.rows import only, random_rows
from tests.oracle.test_formulas import CASES, Case
from tests.oracle.trainers import ONE_STEP, assert_equal, loss_and_gradients, noisy

OF_PAIRS = [case for case in CASES if case.name != "kto"]
FIRST = list({case.name: case for case in reversed(OF_PAIRS)}.values())
# Where a gradient is stopped on purpose, the loss does not change as its gradient says.
STOPPED = {"tdpo2"}


@pytest.fixture(scope="module")
def rows(text):
    """Rows with every column a loss may read, in numbers that single precision holds: that is how columns travel."""
    numbers = [row.columns for row in random_rows(8, seed=6)]
    exact = [{name: round(value * 64) / 64 for name, value in columns.items()} for columns in numbers]
    targets = [row["rejected"] for row in text[1][1:]] + [" and a third answer"]
    rows = zip(text[1], exact, targets, strict=True)
    return [{**row, **columns, "target": target} for row, columns, target in rows]


def float64_model(seed: int, tokenizer, positions: int = 64) -> GPT2LMHeadModel:
    """GPT-2, because Llama's norms and positions compute in float32 whatever the weights are."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    return noisy(GPT2LMHeadModel(config).double(), seed).eval()


def make_trainer(case: Case, tokenizer, rows, folder) -> PreferenceTrainer:
    loss = make(case.name, **case.knobs)
    return PreferenceTrainer(
        float64_model(1, tokenizer),
        None if loss.needs.reference == "none" else float64_model(2, tokenizer),
        PreferenceConfig(output_dir=str(folder), **{**ONE_STEP, "per_device_train_batch_size": 16}),
        Objective([(1.0, loss)]),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def with_columns(rows: list[dict[str, Any]], case: Case) -> list[dict[str, Any]]:
    names = ("prompt", "chosen", "rejected", *case.columns)
    return [{name: row[name] for name in names} for row in rows]


def distributions(model, row: Mapping[str, Any], side: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all entries at an answer's scored tokens `[m, V]`, from the model's own logits of the one
    sequence, and the tokens `[m]`."""
    ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
    start, scored = len(row["prompt_ids"]), torch.tensor(row[f"{side}_scored"], dtype=torch.bool)
    return model(input_ids=ids).logits[0].log_softmax(-1)[start - 1 : -1][scored], ids[0, start:][scored]


class Formula:
    """The mean of a loss's values over its units, from a policy and a reference of its own."""

    def __init__(self, case: Case, tokenizer, token_rows) -> None:
        self.case, self.token_rows = case, token_rows
        self.model, self.reference = float64_model(1, tokenizer), float64_model(2, tokenizer)

    def answer(self, row: Mapping[str, Any], side: str) -> Answer:
        log_p, ids = distributions(self.model, row, side)
        with torch.no_grad():
            log_q, _ = distributions(self.reference, row, side)
        policy, reference = (each.gather(1, ids[:, None])[:, 0] for each in (log_p, log_q))
        return Answer(policy, reference, kl=(log_q.exp() * (log_q - log_p)).sum(1))

    def values(self) -> list[Tensor]:
        rows = self.token_rows
        if "completion_ids" in rows[0]:
            answers, mismatched = ([self.answer(row, side) for row in rows] for side in ("completion", "mismatched"))
            return float64.kto(answers, [row["desirable"] for row in rows], mismatched, **self.case.knobs)
        pairs = [
            Pair(
                self.answer(row, "chosen"),
                self.answer(row, "rejected"),
                only(row["columns"], self.case.columns),
                self.answer(row, "target") if "target" in self.case.columns else None,
            )
            for row in rows
        ]
        return float64.values(self.case.name, pairs, **self.case.knobs)

    def loss_and_gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss = torch.stack(self.values()).mean()
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in self.model.named_parameters()}


def compare(case: Case, trainer: PreferenceTrainer, tokenizer) -> None:
    loss, gradients = loss_and_gradients(trainer)
    expected, their_gradients = Formula(case, tokenizer, trainer.train_dataset).loss_and_gradients()
    assert loss == pytest.approx(expected, rel=1e-10, abs=1e-10)
    largest = max(gradient.abs().max().item() for gradient in their_gradients.values())
    assert largest > 1e-4
    assert_equal(gradients, their_gradients, 1e-10 * max(1.0, largest))


@pytest.mark.parametrize("case", OF_PAIRS, ids=lambda case: case.label)
def test_loss_and_every_gradient(case: Case, text, rows, tmp_path):
    compare(case, make_trainer(case, text[0], with_columns(rows, case), tmp_path), text[0])


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.label)
def test_an_unscored_last_token_is_in_no_sum_and_in_no_length(case: Case, text, rows, tmp_path):
    data = make_trainer(case, text[0], with_columns(rows, case), tmp_path).train_dataset
    without = [
        {**row, **{f"{side}_scored": _last_off(row[f"{side}_scored"]) for side in ("chosen", "rejected")}}
        for row in data
    ]
    compare(case, make_trainer(case, text[0], replace(data, rows=without, reference=""), tmp_path), text[0])


def _last_off(scored: Any) -> Any:
    return np.append(np.asarray(scored)[:-1], False)


@pytest.mark.parametrize("case", [case for case in FIRST if case.name not in STOPPED], ids=lambda case: case.label)
def test_a_step_in_a_direction_changes_the_loss_by_its_slope(case: Case, text, rows, tmp_path):
    """Against central differences, so that scores made outside the differentiated function would show."""
    trainer = make_trainer(case, text[0], with_columns(rows, case), tmp_path)
    _, gradients = loss_and_gradients(trainer)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    random = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(gradient.shape, generator=random).double() for name, gradient in gradients.items()}

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter += step * direction[name]
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).item()
            for name, parameter in trainer.model.named_parameters():
                parameter -= step * direction[name]
        return loss

    slope = sum((gradients[name] * direction[name]).sum() for name in gradients).item()
    assert (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    "case", [case for case in FIRST if make(case.name).needs.reference == "none"], ids=lambda case: case.label
)
def test_a_loss_without_a_reference_makes_one_forward_and_holds_one_model(case: Case, text, rows, tmp_path):
    trainer = make_trainer(case, text[0], with_columns(rows, case), tmp_path)
    batch, forwards = trainer.data_collator(list(trainer.train_dataset)), []
    trainer.model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    trainer.compute_loss(trainer.model, batch)
    assert forwards == [True]
    assert isinstance(trainer.reference, NoReference)


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "kto"], ids=lambda case: case.label)
def test_a_step_of_kto(case: Case, text, rows, tmp_path):
    """A step of its own, because the mean over mismatched answers is taken before the loss."""
    trainer = make_trainer(case, text[0], with_columns(rows, case), tmp_path)
    trainer.train()
    formula = Formula(case, text[0], trainer.train_dataset)
    loss, gradients = formula.loss_and_gradients()
    after = {name: parameter - gradients[name] for name, parameter in formula.model.named_parameters()}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)  # logs are of single precision
    assert_equal(dict(trainer.model.named_parameters()), after, 1e-10)
