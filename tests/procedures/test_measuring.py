"""The gap between the answers of a pair, against the model's own logits."""

from __future__ import annotations

import json

import pytest
import torch

from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.errors import NonFiniteError
from prefopt.procedures.measuring import answer_gaps
from prefopt.recipe import load_recipe
from tests.helpers import make_model, make_tokenizer, text_pairs

RECIPE = """
model_name_or_path: tiny
data_files: pairs.jsonl
loss: {name: dpo}
max_dropped: 1.0
per_device_eval_batch_size: 3
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A folder with a model and seven pairs; the model, the tokenizer, and the pairs as examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs(7)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return model, tokenizer, load_examples(DataSpec(data_files="pairs.jsonl"))


def log_probability(model, tokenizer, prompt: str, answer: str) -> torch.Tensor:
    """The log-probability of each token of an answer, its end included."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return logits[len(before) - 1 : -1].gather(1, torch.tensor(after)[:, None])[:, 0]


def test_gaps_are_those_of_the_model_s_own_logits(start):
    model, tokenizer, loaded = start
    gaps = answer_gaps(load_recipe("recipe.yaml"), loaded.examples, loaded.report)
    assert len(gaps) == 7
    for example in loaded.examples:
        chosen, rejected = (
            log_probability(model, tokenizer, example.prompt, answer) for answer in (example.chosen, example.rejected)
        )
        gap = gaps[example.example_id]
        assert gap.sum == pytest.approx(float(chosen.sum() - rejected.sum()), abs=1e-4)
        assert gap.mean == pytest.approx(float(chosen.mean() - rejected.mean()), abs=1e-5)


def test_a_pair_that_training_drops_has_no_gap(start):
    *_, loaded = start
    recipe = load_recipe("recipe.yaml", ["--max_length", "18", "--truncation_mode", "drop"])
    gaps = answer_gaps(recipe, loaded.examples, loaded.report)
    assert 0 < len(gaps) < 7


def test_scores_that_are_not_finite_are_refused(start):
    model, _, loaded = start
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained("tiny")
    with pytest.raises(NonFiniteError, match="scores of 7 pairs are not finite"):
        answer_gaps(load_recipe("recipe.yaml"), loaded.examples, loaded.report)
