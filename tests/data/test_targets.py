"""A second stream of targets: each pair gets one, with a prompt of its own, whatever the order and the layout."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from prefopt import PreferenceConfig
from prefopt.data.collation import Collator, row_length, row_width
from prefopt.data.dataset import TokenDataset
from prefopt.data.prepare import Preparation
from prefopt.data.spec import DataSpec
from prefopt.data.targets import with_targets
from prefopt.errors import DataError, RecipeError
from prefopt.losses import Objective
from prefopt.recipe import load_recipe
from prefopt.reference.answers import answers_of, plan_of_answers
from tests.data.test_collation import pair, single
from tests.data.test_layout import paths
from tests.helpers import make_tokenizer, text_pairs
from tests.training import make_trainer, weights


def pairs(count: int) -> TokenDataset:
    return TokenDataset([pair(seed, seed) for seed in range(count)])


def singles(count: int) -> TokenDataset:
    return TokenDataset([single(seed + 100, True) for seed in range(count)])


def given(data: TokenDataset) -> dict[bytes, tuple[bytes, bytes]]:
    """Chosen answer -> prompt and ids of its target."""
    return {row["chosen_ids"].tobytes(): (bytes(row["target_prompt_ids"]), bytes(row["target_ids"])) for row in data}


def test_every_pair_gets_one_and_every_target_is_used_as_often_as_the_others():
    data, targets = with_targets(pairs(7), singles(3)), singles(3)
    whole = {(bytes(row["prompt_ids"]), bytes(row["completion_ids"])) for row in targets}
    used = Counter(given(data).values())
    assert set(used) == whole and sorted(used.values()) == [2, 2, 3]
    assert len(set(given(with_targets(pairs(3), singles(7))).values())) == 3


def test_which_one_follows_from_the_rows_and_the_seed_and_not_from_their_order():
    one, other = pairs(7), singles(5)
    turned = [TokenDataset(data.rows[::-1]) for data in (one, other)]
    assert given(with_targets(one, other)) == given(with_targets(*turned))
    assert given(with_targets(one, other, seed=1)) != given(with_targets(one, other, seed=2))


def test_a_target_is_read_behind_its_own_prompt_in_every_layout():
    rows = with_targets(pairs(5), singles(5)).rows
    plain, shared = (Collator(targets=True, shared=shared)(rows) for shared in (False, True))
    assert paths(plain) == paths(shared)
    last = paths(plain)[-plain["target_tokens"] :]
    whole = [[*row["target_prompt_ids"], *row["target_ids"]] for row in rows]
    assert [(past, token) for past, token in last if [*past, token] in whole] == [
        (ids[:-1], ids[-1]) for ids, row in zip(whole, rows, strict=True) if row["target_scored"][-1]
    ]
    for row in rows:
        own, answer = len(row["target_prompt_ids"]), len(row["target_ids"])
        sides = [len(row["chosen_ids"]), len(row["rejected_ids"])]
        assert row_length(row) == 2 * len(row["prompt_ids"]) + sum(sides) + own + answer
        assert row_width(row, shared=True) == max(len(row["prompt_ids"]) + sum(sides), own + answer)
        assert row_width(row, shared=False) == max(len(row["prompt_ids"]) + max(sides), own + answer)


def test_a_reference_scores_it_behind_that_prompt_too():
    data = with_targets(pairs(4), singles(4))
    answers = answers_of([data], all_completions=True)
    assert len(answers) == 12
    targets = [answer for answer in answers.values() if answer.side == "target"]
    plan = plan_of_answers(targets, Collator(paired=False))
    assert plan["tokens"] == sum(
        len(answer.row["target_prompt_ids"]) + len(answer.row["target_ids"]) for answer in targets
    )
    assert [answer.tokens for answer in targets] == [
        len(answer.row["target_prompt_ids"]) + len(answer.row["target_ids"]) for answer in targets
    ]


@pytest.mark.parametrize(
    ("data", "targets", "message"),
    [
        (singles(2), singles(2), "they stand beside pairs"),
        (pairs(2), pairs(2), "the rows are pairs; give rows of `prompt` and `completion`"),
        (with_targets(pairs(2), singles(2)), singles(2), "a column `target` already"),
        (pairs(2), TokenDataset([single(4, False)]), "row 4: .* labelled undesirable"),
    ],
)
def test_rows_that_cannot_go_together_are_refused(data, targets, message):
    with pytest.raises(DataError, match=message):
        with_targets(data, targets)


ANSWERS = [{"prompt": f"say {word}", "completion": f" {word} it is"} for word in ("red", "blue", "green")]


def files(folder, answers=ANSWERS):
    for name, rows in {"pairs": text_pairs(12), "answers": answers}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spec(folder):
    return DataSpec(
        data_files=str(folder / "pairs.jsonl"),
        test_split_size=3,
        targets=DataSpec(mixture=(DataSpec(data_files=str(folder / "answers.jsonl")),)),
    )


def preparation(loss, folder):
    args = PreferenceConfig(output_dir=str(folder), report_to="none")
    return Preparation.for_objective(make_tokenizer(), args, Objective.of(loss), say=lambda *lines: None)


def test_training_and_test_rows_of_a_recipe_get_theirs(tmp_path):
    files(tmp_path)
    train, test = preparation("slic", tmp_path).train_and_test(spec(tmp_path))
    assert "target" in train.columns and "target" in test.columns and len(train) == 9
    tokenizer = make_tokenizer()
    said = {
        tokenizer.decode([*row["target_prompt_ids"], *row["target_ids"]], skip_special_tokens=True) for row in train
    }
    assert said == {row["prompt"] + row["completion"] for row in ANSWERS}


def test_a_loss_that_reads_no_target_refuses_them_before_a_file_is_opened(tmp_path):
    with pytest.raises(RecipeError, match="no loss of this run reads a target"):
        preparation("dpo", tmp_path).train_and_test(spec(tmp_path))


def test_its_likelihood_is_the_models_own_behind_that_prompt(tmp_path):
    files(tmp_path)
    train, _ = preparation("slic", tmp_path).train_and_test(spec(tmp_path))
    trainer = make_trainer(tmp_path, train, loss="slic", per_device_train_batch_size=9, learning_rate=0.0)
    with torch.no_grad():
        expected = [-_logp(trainer.model, row) for row in train]
    trainer.train()
    assert trainer.state.log_history[0]["target_nll"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def _logp(model, row):
    ids = torch.tensor([[*row["target_prompt_ids"], *row["target_ids"]]])
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    start = len(row["target_prompt_ids"]) - 1
    return float(logp[start:, 0][torch.from_numpy(row["target_scored"])].sum())


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_one_step_however_the_rows_are_split(tmp_path, layout):
    files(tmp_path)
    train, _ = preparation("slic", tmp_path).train_and_test(spec(tmp_path))

    def after(size):
        trainer = make_trainer(
            tmp_path / str(size), train, loss="slic", per_device_train_batch_size=size, row_layout=layout,
            gradient_accumulation_steps=9 // size, learning_rate=0.01,
        )  # fmt: skip
        trainer.train()
        return weights(trainer.model)

    assert (after(9) - after(3)).abs().max() < 1e-6


def test_a_recipe_names_them_like_a_mixture(tmp_path):
    path = tmp_path / "r.yaml"
    text = "model_name_or_path: m\ndata_files: pairs.jsonl\nloss: {name: slic}\noutput_dir: out\ntargets:\n"
    path.write_text(text + "  - data_files: answers.jsonl\n    fraction: 0.5\n")
    found = load_recipe(path).data_spec().targets
    assert [(entry.data_files, entry.fraction) for entry in found.mixture] == [("answers.jsonl", 0.5)]
    path.write_text(text + "  - data_file: answers.jsonl\n")
    with pytest.raises(RecipeError, match=r"targets\.0\.data_file"):
        load_recipe(path)
