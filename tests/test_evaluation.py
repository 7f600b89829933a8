"""Evaluation agrees with plain forwards row by row, whatever the batch, the processes and the kind of checkpoint."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from prefopt.errors import DataError, NonFiniteError, UserError
from prefopt.evaluation import evaluate_files, evaluate_model, evaluation_text
from tests import helpers


def token_rows(tokenizer, n, seed=0):
    """`n` pairs as token rows, the last answer token of each left unscored so that masks matter."""
    rows = []
    for index, pair in enumerate(helpers.text_pairs(n, seed)):
        row = {"example_id": str(index), "row": index, "columns": {}}
        row["prompt_ids"] = [tokenizer.bos_token_id, *tokenizer(pair["prompt"])["input_ids"]]
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(pair[side])["input_ids"], tokenizer.eos_token_id]
            row[f"{side}_ids"], row[f"{side}_scored"] = ids, [True] * (len(ids) - 1) + [False]
        rows.append(row)
    return rows


def unpaired(rows):
    """The same answers one by one, desirable and not in turn."""
    singles = []
    for row in rows:
        for side, desirable in (("rejected", False), ("chosen", True)):
            singles.append(
                {
                    "example_id": f"{row['example_id']}{side}", "row": len(singles), "columns": {},
                    "prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"],
                    "completion_scored": row[f"{side}_scored"], "desirable": desirable,
                }
            )  # fmt: skip
    return singles


def plain_scores(model, row, side):
    """Log-probability and entropy of each scored token `[m]`, from the model's own logits of the one sequence."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    start, scored = len(row["prompt_ids"]), torch.tensor(row[f"{side}_scored"])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)[start - 1 : -1]
    picked = logps.gather(1, ids[0, start:, None])[:, 0]
    return picked[scored], -(logps.exp() * logps).sum(-1)[scored]


def expected(model, reference, rows):
    """Every metric of the pairs, the slow way."""
    values = {}

    def add(name, value):
        values.setdefault(name, []).extend(torch.as_tensor(value).double().reshape(-1).tolist())

    for row in rows:
        sums, means, ratios = {}, {}, {}
        for side in ("chosen", "rejected"):
            logp, entropy = plain_scores(model, row, side)
            ref_logp, _ = plain_scores(reference, row, side)
            sums[side], means[side], ratios[side] = logp.sum(), logp.mean(), (logp - ref_logp).sum()
            add(f"logps/{side}", logp.sum())
            add(f"logp_per_token/{side}", logp)
            add(f"logratios/{side}", (logp - ref_logp).sum())
            add(f"logratio_per_token/{side}", logp - ref_logp)
            add(f"length/{side}", len(logp))
            add("entropy", entropy)
        add("accuracy", sums["chosen"] > sums["rejected"])
        add("accuracy_per_token", means["chosen"] > means["rejected"])
        add("reward_accuracy", ratios["chosen"] > ratios["rejected"])
        add("margin", sums["chosen"] - sums["rejected"])
        add("reward_margin", ratios["chosen"] - ratios["rejected"])
    return {name: {"value": sum(items) / len(items), "count": len(items)} for name, items in values.items()}


def assert_same(metrics, other, tolerance=1e-5):
    assert metrics.keys() == other.keys()
    for name, figure in other.items():
        assert metrics[name]["count"] == figure["count"], name
        assert metrics[name]["value"] == pytest.approx(figure["value"], abs=tolerance, rel=tolerance), name


@pytest.fixture(scope="module")
def reference(tokenizer):
    return helpers.make_model(seed=1, vocab_size=len(tokenizer))


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_figures_equal_plain_forwards(tokenizer, model, reference, batch_size):
    rows = token_rows(tokenizer, 7)
    result = evaluate_model(model, tokenizer, rows, reference=reference, batch_size=batch_size)
    assert result["rows"] == 7
    assert result["paired"]
    assert_same(result["metrics"], expected(model, reference, rows))


def test_without_a_reference_there_are_no_ratios(tokenizer, model):
    metrics = evaluate_model(model, tokenizer, token_rows(tokenizer, 4))["metrics"]
    assert {"accuracy", "margin", "logps/chosen", "entropy"} <= metrics.keys()
    assert not [name for name in metrics if "ratio" in name or "reward" in name]


def test_a_model_against_itself_has_no_margin(tokenizer, model):
    metrics = evaluate_model(model, tokenizer, token_rows(tokenizer, 4), reference=model)["metrics"]
    assert metrics["reward_margin"]["value"] == 0.0
    assert metrics["reward_accuracy"]["value"] == 0.0


def test_unpaired_rows_have_sides_but_no_accuracy(tokenizer, model, reference):
    rows = token_rows(tokenizer, 5)
    result = evaluate_model(model, tokenizer, unpaired(rows), reference=reference, batch_size=3)
    slow = expected(model, reference, rows)
    pairs_only = {"accuracy", "accuracy_per_token", "reward_accuracy", "margin", "reward_margin"}
    assert not result["paired"]
    assert_same(result["metrics"], {name: figure for name, figure in slow.items() if name not in pairs_only})


def test_one_kind_of_completion_alone(tokenizer, model):
    rows = [row for row in unpaired(token_rows(tokenizer, 3)) if row["desirable"]]
    metrics = evaluate_model(model, tokenizer, rows)["metrics"]
    assert metrics["length/chosen"]["count"] == 3
    assert "length/rejected" not in metrics


def test_training_mode_and_gradients_are_left_alone(tokenizer, model):
    model.train()
    evaluate_model(model, tokenizer, token_rows(tokenizer, 2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_rows_is_refused(tokenizer, model):
    with pytest.raises(DataError, match="no row"):
        evaluate_model(model, tokenizer, [])


def test_scores_that_are_not_finite_name_their_rows(tokenizer, model):
    rows = token_rows(tokenizer, 6)
    marked = next(index for index in range(300, 320) if not any(index in row["prompt_ids"] for row in rows))
    rows[4]["prompt_ids"] = [*rows[4]["prompt_ids"], marked]
    model.get_input_embeddings().weight.data[marked] = float("nan")
    with pytest.raises(NonFiniteError, match=r"row 4 \(counted from 0\)"):
        evaluate_model(model, tokenizer, rows, batch_size=2)


def evaluate_on_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes; the second has no row of the smallest set."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    tokenizer = helpers.make_tokenizer()
    model, reference = (helpers.make_model(seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    results = []
    for n in (1, 5):
        rows = token_rows(tokenizer, n)
        results.append(
            evaluate_model(model, tokenizer, rows, reference=reference, batch_size=2, accelerator=accelerator)
        )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tokenizer, model, reference, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(evaluate_on_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for n, result in zip((1, 5), first, strict=True):
        alone = evaluate_model(model, tokenizer, token_rows(tokenizer, n), reference=reference)
        assert result["rows"] == n
        assert_same(result["metrics"], alone["metrics"])


@pytest.fixture
def checkpoint(tokenizer, model, tmp_path):
    """A model and its tokenizer as they lie on disk."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_checkpoint_on_a_file_of_pairs(checkpoint, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", helpers.text_pairs(6))
    result = evaluate_files(str(checkpoint), pairs, str(checkpoint), batch_size=4)
    assert result["rows"] == 6
    assert result["metrics"]["accuracy"]["count"] == 6
    assert result["metrics"]["reward_margin"]["value"] == 0.0
    text = evaluation_text(result)
    assert "pairs.jsonl" in text
    assert "6 pairs" in text
    assert all(name in text for name in result["metrics"])


def test_conversations_are_read_and_rows_left_out_are_counted(checkpoint, tmp_path):
    def turn(role, content):
        return [{"role": role, "content": content}]

    words = ["saw", "on", "birds", *(f"two {index} birds" for index in range(200))]
    rows = [
        {"prompt": turn("user", "the cat"), "chosen": turn("assistant", "sat"), "rejected": turn("assistant", word)}
        for word in words
    ]
    rows[2]["prompt"] = turn("user", "the cat sat on a mat " * 40)
    result = evaluate_files(str(checkpoint), [write_rows(tmp_path / "chats.jsonl", rows)], max_length=100)
    assert result["rows"] == len(rows) - 1
    assert sum(result["dropped"].values()) == 1
    assert "left out: 1 " in evaluation_text(result)


def test_a_bad_row_is_refused_before_a_model_is_loaded(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    path = write_rows(
        tmp_path / "pairs.jsonl", [*helpers.text_pairs(2), {"prompt": "the", "chosen": "", "rejected": "a"}]
    )
    with pytest.raises(DataError, match=r"pairs\.jsonl:3"):
        evaluate_files(str(checkpoint), path)


def test_a_file_of_labelled_answers(checkpoint, tmp_path):
    rows = [
        {"prompt": "the cat", "completion": " sat", "label": True},
        {"prompt": "a mat", "completion": " saw", "label": False},
    ]
    result = evaluate_files(str(checkpoint), write_rows(tmp_path / "labelled.jsonl", rows))
    assert not result["paired"]
    assert "accuracy" not in result["metrics"]
    assert "2 completions" in evaluation_text(result)


def test_an_adapter_folder_against_its_base(checkpoint, tokenizer, model, tmp_path):
    folder = tmp_path / "adapter"
    model.name_or_path = str(checkpoint)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = write_rows(tmp_path / "pairs.jsonl", helpers.text_pairs(4))
    metrics = evaluate_files(str(folder), pairs, str(checkpoint))["metrics"]
    assert metrics["reward_margin"]["value"] != 0.0
    assert metrics["logps/chosen"] != evaluate_files(str(checkpoint), pairs)["metrics"]["logps/chosen"]


def test_a_reference_with_another_vocabulary_is_refused(checkpoint, tmp_path):
    other = tmp_path / "other"
    tokenizer = helpers.make_tokenizer(vocab_size=300)
    helpers.make_model(vocab_size=len(tokenizer)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="another vocabulary"):
        evaluate_files(str(checkpoint), write_rows(tmp_path / "p.jsonl", helpers.text_pairs(2)), str(other))
