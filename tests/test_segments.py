"""Conversations of several turns through the whole trainer: layouts, splits, the store, and an oracle in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from prefopt.config import PreferenceConfig
from prefopt.errors import DataError
from prefopt.losses import Objective, make
from prefopt.trainer import PreferenceTrainer
from tests.helpers import WORDS, make_model, make_tokenizer
from tests.oracle.float64 import Answer, Pair, formula
from tests.oracle.test_through_the_model import distributions, float64_model
from tests.oracle.trainers import ONE_STEP, assert_equal, loss_and_gradients
from tests.training import make_trainer, trained, weights


def session(rng: random.Random, turns: int) -> list[dict[str, str]]:
    """Assistant and others in turn, the assistant first and last."""

    def says(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))}

    others = [says(rng.choice(["user", "tool"])) for _ in range(turns - 1)]
    spoken = [says("assistant") for _ in range(turns)]
    return [message for pair in zip(spoken, [*others, None], strict=True) for message in pair if message]


def sessions(count: int, seed: int = 0, turns: tuple[int, ...] = (3,)) -> list[dict[str, Any]]:
    """Pairs of continuations of one history, `turns` assistant turns on each side; the first turns differ."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prompt = [{"role": "system", "content": "near"}, {"role": "user", "content": " ".join(rng.choices(WORDS, k=3))}]
        length = turns[index % len(turns)]
        chosen, rejected = session(rng, length), session(rng, length)
        rejected[0]["content"] += " red"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def with_segments(rows: list[dict[str, Any]], segments: Any) -> list[dict[str, Any]]:
    return [{**row, "segments": segments} for row in rows]


def cut(rows: list[dict[str, Any]], messages: int) -> list[dict[str, Any]]:
    return [{**row, "chosen": row["chosen"][:messages], "rejected": row["rejected"][:messages]} for row in rows]


SIX = sessions(6)
STEP = {"per_device_train_batch_size": 6, "learning_rate": 0.3}
ANY = {"chosen": [0, 2], "rejected": [1, 2]}


# ---- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_a_segment_of_the_first_turn_is_dpo_on_that_turn(tmp_path, layout):
    """What is said after the segment is read and changes nothing."""
    step = {**STEP, "row_layout": layout}
    found = trained(tmp_path, with_segments(SIX, 1), loss="segment_dpo", **step)
    torch.testing.assert_close(found, trained(tmp_path, cut(SIX, 1), loss="dpo", **step), atol=1e-6, rtol=0)
    whole = trained(tmp_path, SIX, loss="segment_dpo", **step)
    assert (found - whole).abs().max() > 1e-4


def test_the_whole_of_equal_conversations_is_eto(tmp_path):
    ends = [trained(tmp_path, rows, loss=loss, **STEP)
            for rows, loss in ((with_segments(SIX, 3), "segment_dpo"), (SIX, "eto"), (SIX, "dpo"))]  # fmt: skip
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


def test_whole_conversations_with_bounds_train_as_their_segments_do(tmp_path):
    whole = [
        {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]],
         "start_message": 4, "end_message": 4} for row in SIX
    ]  # fmt: skip
    built = with_segments(cut(SIX, 3), {"chosen": [1], "rejected": [1]})
    assert torch.equal(*(trained(tmp_path, rows, loss="segment_dpo", **STEP) for rows in (whole, built)))


def test_eto_and_dmpo_read_no_segment(tmp_path):
    for loss in ("eto", "dmpo"):
        ends = [trained(tmp_path, rows, loss=loss, **STEP) for rows in (SIX, with_segments(SIX, ANY))]
        assert torch.equal(*ends)


def test_what_the_partner_says_is_read_and_not_scored(tmp_path):
    """Another answer of the partner, of as many tokens, changes the conditioning and not the mask."""
    said = {**SIX[0], "chosen": [dict(message) for message in SIX[0]["chosen"]]}
    others = [message for message in said["chosen"] if message["role"] != "assistant"]
    others[0]["content"] = "owl" if others[0]["content"] != "owl" else "elk"
    rows = [make_trainer(tmp_path, [row, *SIX[1:]], loss="segment_dpo").train_dataset[0] for row in (SIX[0], said)]
    scored = [row["chosen_ids"][row["chosen_scored"]].tolist() for row in rows]
    assert scored[0] == scored[1]
    assert rows[0]["chosen_ref_logp"].tolist() != rows[1]["chosen_ref_logp"].tolist()


# ---- exactness ------------------------------------------------------------------------------------------------------

TEN = [
    {**row, "segments": {"chosen": [0, 1 + index % 2], "rejected": [index % 2, 2]}}
    for index, row in enumerate(sessions(10, seed=1))
]


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("loss", ["segment_dpo", "eto", "dmpo"])
def test_any_split_and_layout_gives_the_same_step(tmp_path, loss, layout):
    ends = [
        trained(tmp_path, TEN, loss=loss, learning_rate=0.3, row_layout=layout, reference_block={"source": source},
                per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        for batch, steps, source in ((10, 1, "cached"), (4, 3, "live"), (3, 4, "cached"))
    ]  # fmt: skip
    assert (ends[0] - weights(make_model())).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-6, rtol=0)


CASES = [
    ("segment_dpo", {}, None),
    ("segment_dpo", {"beta": 0.5}, ANY),
    ("eto", {}, ANY),
    ("dmpo", {}, None),
    ("dmpo", {"gamma": 0.4, "turn_weight": "phi"}, ANY),
]


@pytest.mark.parametrize(("name", "knobs", "segments"), CASES)
def test_loss_and_gradients_are_the_formulas_on_the_models_own_logits(tmp_path, name, knobs, segments):
    """In float64, one conversation at a time; turns are found by the assistant's end markers, not by our own code."""
    tokenizer = make_tokenizer()
    rows = sessions(4, seed=2, turns=(3, 4)) if segments is None else with_segments(sessions(4, seed=2), segments)
    trainer = PreferenceTrainer(
        _long(1, tokenizer),
        _long(2, tokenizer),
        PreferenceConfig(output_dir=str(tmp_path), **{**ONE_STEP, "per_device_train_batch_size": 8}),
        make(name, **knobs),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    loss, gradients = loss_and_gradients(trainer)
    model, reference = _long(1, tokenizer), _long(2, tokenizer)

    def answer(row: Any, side: str) -> Answer:
        log_p, ids = distributions(model, row, side)
        with torch.no_grad():
            log_q, _ = distributions(reference, row, side)
        policy, known = (each.gather(1, ids[:, None])[:, 0] for each in (log_p, log_q))
        ends = (ids == tokenizer.eos_token_id).long()
        turn = (ends.cumsum(0) - ends).tolist()
        counted = range(9) if segments is None else segments[side]
        return Answer(policy, known, turn=turn, segment=[float(number in counted) for number in turn])

    pairs = [Pair(answer(row, "chosen"), answer(row, "rejected")) for row in trainer.train_dataset]
    expected = torch.stack([formula(name)(pair, **knobs) for pair in pairs]).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    theirs = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-4
    assert_equal(gradients, theirs, 1e-10)


def _long(seed: int, tokenizer: Any) -> Any:
    return float64_model(seed, tokenizer, positions=256)


def test_a_mixture_gives_each_loss_its_own_turns(tmp_path):
    """The segment of one term does not reach the others."""
    rows, start = with_segments(SIX, 1), weights(make_model())
    parts = [trained(tmp_path, rows, loss=loss, **STEP) - start for loss in ("segment_dpo", "eto", "sft")]
    mixture = Objective([(0.5, make("segment_dpo")), (2.0, make("eto")), (0.1, make("sft"))])
    found = trained(tmp_path, rows, loss=mixture, **STEP) - start
    torch.testing.assert_close(found, 0.5 * parts[0] + 2.0 * parts[1] + 0.1 * parts[2], atol=2e-6, rtol=0)


# ---- the store, resuming, evaluation --------------------------------------------------------------------------------


def test_one_pass_of_the_reference_serves_every_segment_and_loss(tmp_path):
    """Scores are of all turns, so another segment, or another loss of turns, finds them."""
    trainers = [
        make_trainer(tmp_path, rows, loss=loss, reference_block={"source": "cached"})
        for rows, loss in (
            (with_segments(SIX, 1), "segment_dpo"),
            (with_segments(SIX, ANY), "segment_dpo"),
            (SIX, "eto"),
        )
    ]
    data = [trainer.train_dataset for trainer in trainers]
    assert data[0].answer_ids == data[1].answer_ids == data[2].answer_ids
    assert len({each.fingerprint for each in data}) == 3  # but a resumed run is told when the segments changed


def test_evaluation_rows_have_segments_where_training_rows_have(tmp_path):
    with pytest.raises(DataError, match="training rows pairs with segments"):
        make_trainer(tmp_path, with_segments(SIX, 1), loss="segment_dpo", eval_rows=SIX)
    trainer = make_trainer(tmp_path, with_segments(SIX, 1), loss="segment_dpo", eval_rows=with_segments(SIX, 1))
    figures = trainer.evaluate()
    assert figures["eval_turns/chosen"] == 1.0 and "eval_turn_margins/1" not in figures
    plain = make_trainer(tmp_path, cut(SIX, 1), eval_rows=cut(SIX, 1)).evaluate()
    assert figures["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_metrics_of_turns_are_means_over_the_pairs_that_have_the_turn(tmp_path):
    rows = sessions(6, turns=(1, 5))
    logs = []
    for batch, steps in ((6, 1), (1, 6)):
        trainer = make_trainer(tmp_path, rows, loss="eto", per_device_train_batch_size=batch,
                               gradient_accumulation_steps=steps)  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    names = [name for name in logs[0] if name.startswith("turn")]
    assert {"turn_margins/0", "turn_margins/2", "turn_margins/later", "turns/chosen", "turn_tokens/rejected"} <= set(
        names
    )
    assert [logs[1][name] for name in names] == pytest.approx([logs[0][name] for name in names], rel=1e-5, abs=1e-6)
    assert logs[0]["turns/chosen"] == 3.0
