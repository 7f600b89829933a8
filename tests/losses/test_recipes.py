"""The recipe that comes with each loss trains a tiny model for two steps, without the Hub."""

from __future__ import annotations

import json

import pytest

from prefopt.losses import get, names
from prefopt.procedures.train import train
from prefopt.recipe import load_recipe
from tests.helpers import text_pairs
from tests.losses.facts import facts_of

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
SHIPPED = [name for name in names() if get(name).__module__.startswith("prefopt.losses.")]


@pytest.mark.parametrize("name", [*SHIPPED, "tr_dpo"])
def test_a_recipe_trains(name, tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.procedures.train.save_plots", lambda *_: [])  # slower than all the rest
    own = facts_of(name).columns if name in SHIPPED else {}
    rows = text_pairs(8, **{"score_chosen": 2.0, "score_rejected": 1.5, **own})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(name).replace(
        model_name_or_path=None,
        from_scratch=TINY,
        dataset_name=None,
        data_files=[str(tmp_path / "pairs.jsonl")],
        eval_strategy="no",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        use_cpu=True,
        report_to="none",
        output_dir=str(tmp_path / "run"),
    )
    results = train(recipe)
    assert results["steps"] == 2
    assert (recipe.objective().reference == "none") == ("reference" not in recipe.resolved())
