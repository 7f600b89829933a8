"""Our trainer against TRL's on the same rows and weights: token ids, losses, every gradient, a step and its log.

TRL's names and conventions, where they are not ours, stand beside each case; what TRL lacks or computes otherwise is in
the last section. DPOP, ODPO and SLiC's target term have no counterpart there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from datasets import Dataset

from tests.oracle import trainers
from tests.oracle.trainers import (
    TOLERANCE,
    Terms,
    assert_equal,
    loss_and_gradients,
    ours,
    trl_cpo,
    trl_dpo,
    trl_kto,
    worst,
)


class Case(NamedTuple):
    """Our losses, with weights and knobs, and TRL's settings of the same objective."""

    label: str
    terms: Terms
    settings: dict[str, Any]


DPO = Case("dpo", [(1.0, "dpo", {})], {"loss_type": ["sigmoid"], "beta": 0.1})
SFT = Case("sft", [(1.0, "sft", {})], {"loss_type": ["sft"]})
DPO_AND_SFT = Case(
    "dpo+sft", [(1.0, "dpo", {}), (0.5, "sft", {})], {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
)
WITH_REFERENCE = [
    DPO,
    SFT,
    DPO_AND_SFT,
    Case("hinge", [(1.0, "hinge", {"beta": 0.1})], {"loss_type": ["hinge"], "beta": 0.1}),
    Case("ipo", [(1.0, "ipo", {"beta": 0.3})], {"loss_type": ["ipo"], "beta": 0.3}),
    Case(
        "dpo+ipo",
        [(0.7, "dpo", {"beta": 0.3}), (2.0, "ipo", {"beta": 0.3})],
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 2.0], "beta": 0.3},
    ),
    Case("rdpo", [(1.0, "rdpo", {"label_smoothing": 0.2})], {"loss_type": ["robust"], "label_smoothing": 0.2}),
    # TRL has no cDPO. Its `robust` only warns of a negative rate, and at -e / (1 - 2e) it is cDPO at the rate e.
    Case("cdpo", [(1.0, "cdpo", {"label_smoothing": 0.2})], {"loss_type": ["robust"], "label_smoothing": -0.2 / 0.6}),
    Case("fdpo-forward_kl", [(1.0, "fdpo", {"divergence": "forward_kl"})], {"f_divergence_type": "forward_kl"}),
    Case("fdpo-js", [(1.0, "fdpo", {"divergence": "js"})], {"f_divergence_type": "js_divergence"}),
    # TRL's coefficient is 1 - alpha of the paper.
    Case(
        "fdpo-alpha",
        [(1.0, "fdpo", {"divergence": "alpha", "alpha": 0.3})],
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
]
# TRL's `simpo_gamma` is gamma; its trainer adds a likelihood term with weight 1 unless `cpo_alpha` is 0.
WITHOUT_REFERENCE = [
    Case(
        "simpo-gamma",
        [(1.0, "simpo", {"beta": 2.5, "gamma": 0.5})],
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
    ),
    Case("simpo", [(1.0, "simpo", {})], {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    # At beta 1 TRL's hinge is SLiC's with delta 1; its likelihood term is a mean over tokens: `sft`, not the target.
    Case(
        "slic",
        [(1.0, "slic", {"delta": 1.0, "target_weight": 0.0}), (0.5, "sft", {})],
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.5},
    ),
]


@pytest.fixture(params=["text", "cut"])
def data(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["text_without_bos", "cut"])
def data_for_cpo(request):
    return request.getfixturevalue(request.param)


def cases(listed: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", listed, ids=[case.label for case in listed])


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_token_rows_are_those_of_trl(data, tmp_path):
    """Equal ids and equal borders: without them no comparison below would mean anything."""
    mine, other = (make(data, tmp_path).train_dataset for make in (ours, trl_dpo))
    limit = data[2]
    for row, expected in zip(mine, other, strict=True):
        for side in ("chosen", "rejected"):
            ids = [*row["prompt_ids"], *row[f"{side}_ids"]]
            assert ids == [*expected["prompt_ids"], *expected[f"{side}_ids"]][:limit]
            assert len(row["prompt_ids"]) == len(expected["prompt_ids"])
            assert all(row[f"{side}_scored"])


def test_token_rows_are_those_of_the_cpo_trainer(data_for_cpo, tmp_path):
    mine, other = (make(data_for_cpo, tmp_path).train_dataset for make in (ours, trl_cpo))
    for row, expected in zip(mine, other, strict=True):
        for side in ("chosen", "rejected"):
            assert [*row["prompt_ids"], *row[f"{side}_ids"]] == expected[f"{side}_input_ids"]
            assert sum(label != -100 for label in expected[f"{side}_labels"]) == len(row[f"{side}_ids"])


def test_the_limit_cuts_something(cut):
    tokenizer, rows, limit = cut
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    ]
    assert sum(length > limit for length in lengths) >= 4


# ---- losses ---------------------------------------------------------------------------------------------------------


def compare(mine, other):
    found, gradients = loss_and_gradients(mine)
    expected, their_gradients = loss_and_gradients(other)
    assert found == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
    assert_equal(gradients, their_gradients)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1000 * TOLERANCE


@cases(WITH_REFERENCE)
def test_loss_and_every_gradient(data, case, tmp_path):
    compare(ours(data, tmp_path, case.terms), trl_dpo(data, tmp_path, **case.settings))


@cases(WITHOUT_REFERENCE)
def test_loss_and_every_gradient_without_a_reference(data_for_cpo, case, tmp_path):
    compare(ours(data_for_cpo, tmp_path, case.terms), trl_cpo(data_for_cpo, tmp_path, **case.settings))


def test_answers_of_a_thousand_tokens(real, tmp_path):
    """Sums of thousands of nats that differ by tens: what rounding leaves of the margin shows in every gradient."""
    found, gradients = loss_and_gradients(ours(real, tmp_path))
    expected, their_gradients = loss_and_gradients(trl_dpo(real, tmp_path))
    largest = max(gradient.abs().max().item() for gradient in their_gradients.values())
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert_equal(gradients, their_gradients, TOLERANCE * largest)


# ---- single answers -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["text", "cut"])
def labelled(request):
    """One answer to each prompt, good and bad ones in turn."""
    tokenizer, rows, limit = request.getfixturevalue(request.param)
    sides = ["chosen", "rejected", "rejected", "chosen", "chosen", "chosen", "rejected", "chosen"]
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(rows, sides, strict=True)
    ]
    return tokenizer, single, limit


KTO = Case(
    "kto",
    [(1.0, "kto", {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8})],
    {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8},
)
APO_ZERO = Case("kto-z0=zero", [(1.0, "kto", {"z0": "zero"})], {"loss_type": "apo_zero_unpaired", "beta": 0.1})


@cases([KTO, APO_ZERO])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_a_step_of_kto(labelled, case, swapped, tmp_path, monkeypatch):
    """One batch, so that TRL's mean over a batch is ours over a step, with TRL's choice of mismatched answers.

    With policy and reference swapped the mean is above 0; otherwise it is clamped there.
    """
    if swapped:
        roles = {"policy": trainers.reference, "reference": trainers.policy}
        for role, model in roles.items():
            monkeypatch.setattr(trainers, role, model)
    other = trl_kto(labelled, tmp_path, **case.settings)
    theirs = list(other.train_dataset)
    rows = ours(labelled, tmp_path, case.terms).train_dataset
    if case is KTO:
        rows = replace(rows, rows=[with_mismatched(*each, labelled[2]) for each in zip(rows, theirs, strict=True)])
    mine = ours(labelled, tmp_path, case.terms, train_dataset=replace(rows, reference=""))
    mine.train()
    other.train()
    assert_equal(dict(mine.model.named_parameters()), dict(other.model.named_parameters()))
    found, expected = mine.state.log_history[0], other.state.log_history[0]
    assert found["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-4)  # TRL subtracts sums of hundreds of nats
    assert (expected["kl"] > 0.01) == (case is KTO and swapped)


def with_mismatched(row, expected, limit):
    """Our row with the answer that TRL matched with its prompt."""
    assert [*row["prompt_ids"], *row["completion_ids"]] == [*expected["prompt_ids"], *expected["completion_ids"]][
        :limit
    ]
    assert row["desirable"] == expected["label"]
    ids = np.asarray(expected["KL_completion_ids"], dtype=row["completion_ids"].dtype)[: limit - len(row["prompt_ids"])]
    return {**row, "mismatched_ids": ids, "mismatched_scored": np.ones(len(ids), dtype=bool)}


# ---- a step, an evaluation ------------------------------------------------------------------------------------------


@cases([DPO, DPO_AND_SFT])
def test_one_step_and_its_log(data, case, tmp_path):
    mine, other = ours(data, tmp_path, case.terms), trl_dpo(data, tmp_path, **case.settings)
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


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_that_moves(data, alpha, tmp_path):
    """TR-DPO: TRL's callback after every second of five steps, each of all rows."""
    whole = {"max_steps": 5, "learning_rate": 0.1}
    theirs = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    mine = ours(data, tmp_path, reference={"sync_steps": 2, "mixup_alpha": alpha}, **whole)
    other, stays = trl_dpo(data, tmp_path, **theirs, **whole), trl_dpo(data, tmp_path, **whole)
    for trainer in (mine, other, stays):
        trainer.train()
    expected = dict(other.model.named_parameters())
    assert_equal(dict(mine.model.named_parameters()), expected)
    assert max(worst(dict(stays.model.named_parameters()), expected).values()) > 10 * TOLERANCE
    for found, line in zip(mine.state.log_history[:5], other.state.log_history[:5], strict=True):
        assert found["loss"] == pytest.approx(line["loss"], abs=TOLERANCE)
        assert found["rewards/margins"] == pytest.approx(line["rewards/margins"], abs=TOLERANCE, rel=1e-5)


def test_evaluation_of_one_batch(data, tmp_path):
    """TRL's evaluation is exact as long as one batch holds all rows; ours always is."""
    rows = Dataset.from_list(data[1])
    mine = ours(data, tmp_path, per_device_eval_batch_size=3).evaluate(rows)
    expected = trl_dpo(data, tmp_path).evaluate(rows)
    for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "entropy"):
        assert mine[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=TOLERANCE, rel=1e-6), name


# ---- where TRL is another thing -------------------------------------------------------------------------------------


def test_the_label_smoothing_of_trls_sigmoid_does_nothing(text, tmp_path):
    """Asked for cDPO in the way older versions offered it, TRL trains plain DPO; ours asks for a loss that reads it."""
    smoothed, _ = loss_and_gradients(trl_dpo(text, tmp_path, loss_type=["sigmoid"], label_smoothing=0.3))
    plain, _ = loss_and_gradients(ours(text, tmp_path, [(1.0, "dpo", {})]))
    conservative, _ = loss_and_gradients(ours(text, tmp_path, [(1.0, "cdpo", {"label_smoothing": 0.3})]))
    assert smoothed == pytest.approx(plain, abs=TOLERANCE)
    assert abs(conservative - plain) > 100 * TOLERANCE


def test_trls_simpo_at_its_defaults_is_another_loss(text_without_bos, tmp_path):
    """Its defaults are beta 0.1, gamma 0.5 (five times beta) and a likelihood term; ours are the authors' kind."""
    defaults, _ = loss_and_gradients(trl_cpo(text_without_bos, tmp_path, loss_type="simpo"))
    same = [(1.0, "simpo", {"beta": 0.1, "gamma_beta_ratio": 5.0}), (1.0, "sft", {})]
    found, _ = loss_and_gradients(ours(text_without_bos, tmp_path, same))
    assert found == pytest.approx(defaults, abs=TOLERANCE)
    ours_at_defaults, _ = loss_and_gradients(ours(text_without_bos, tmp_path, [(1.0, "simpo", {})]))
    assert abs(ours_at_defaults - defaults) > 0.1
