"""Answers on disk: whole or not there, the same whoever samples them, and never of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prefopt.errors import UserError
from prefopt.generation import Sampling, generate, generate_to_disk, read_generations
from prefopt.generation import shards as shards_module
from prefopt.generation.sampling import DrawTokens
from prefopt.generation.shards import MANIFEST, content_of, shard_name
from prefopt.reference.identity import identify
from tests.helpers import make_model, make_tokenizer, text_pairs
from tests.launching import on_two_ranks

SAMPLING = Sampling(samples_per_prompt=2, max_new_tokens=10, seed=3)
PROMPTS = [row["prompt"] for row in text_pairs(11)]


def write(folder, model, sampling=SAMPLING, prompts=PROMPTS, **options):
    return generate_to_disk(model, make_tokenizer(), prompts, folder, sampling, **{"shard_size": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_are_the_answers_of_generate(model, tokenizer, tmp_path):
    manifest = write(tmp_path, model)
    records = list(read_generations(tmp_path))
    answers = generate(model, tokenizer, PROMPTS, samples_per_prompt=2, max_new_tokens=10, seed=3)
    assert [(record["prompt_index"], record["text"]) for record in records] == [
        (answer.prompt_index, answer.text) for answer in answers
    ]
    assert [record["prompt"] for record in records] == [PROMPTS[answer.prompt_index] for answer in answers]
    assert [record["tokens"] for record in records] == [len(answer.token_ids) for answer in answers]
    assert {record["model"] for record in records} == {identify(model).weights}
    assert (manifest["answers"], len(manifest["shards"])) == (22, 6)
    assert manifest["finished"] == sum(answer.finished for answer in answers)


def test_a_prompt_without_room_is_refused_before_the_first_shard(model, tmp_path):
    with pytest.raises(UserError, match=r"max_new_tokens: the longest prompt has"):
        write(tmp_path / "answers", model, prompts=[*PROMPTS, "the cat " * 600])
    assert not (tmp_path / "answers").exists()


def test_the_content_of_a_folder_is_that_of_its_answers(model, tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write(tmp_path / name, model, Sampling(samples_per_prompt=2, max_new_tokens=10, seed=seed))
    one, same, other = (content_of(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
    with pytest.raises(UserError, match="sampling is not finished"):
        content_of(tmp_path)


def test_a_run_that_was_killed_goes_on_at_the_shard_and_ends_with_the_same_bytes(model, tmp_path, monkeypatch):
    write(tmp_path / "whole", model)
    written = []
    stock = shards_module.write_whole

    def killed(path, text):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        stock(path, text)

    monkeypatch.setattr(shards_module, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", model)
    with pytest.raises(UserError, match="sampling is not finished"):
        list(read_generations(tmp_path / "cut"))
    written.clear()
    monkeypatch.setattr(shards_module, "write_whole", lambda path, text: (written.append(path.name), stock(path, text)))
    write(tmp_path / "cut", model)
    assert written == [*map(shard_name, range(2, 6)), MANIFEST]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_folder_is_sampled_no_more(model, tmp_path, monkeypatch):
    first = write(tmp_path, model)
    monkeypatch.setattr(shards_module, "sample", lambda *args, **kwargs: pytest.fail("sampled"))
    assert write(tmp_path, model) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sampling": Sampling(samples_per_prompt=2, max_new_tokens=10, seed=4)}, "seed: 3 in the answers, 4 now"),
        ({"sampling": Sampling(2, 10, top_p=0.9, seed=3)}, r"top_p: 1.0 in the answers, 0.9 now"),
        ({"prompts": PROMPTS[::-1]}, "prompts: "),
        ({"shard_size": 8}, "shard_size: 4 in the answers, 8 now"),
        ({"model": make_model(seed=5)}, "model.weights: "),
    ],
)
def test_answers_of_something_else_are_refused(model, tmp_path, change, said):
    write(tmp_path, model)
    with pytest.raises(UserError, match=f"not the same run:\n(.*\n)*  {said}"):
        write(tmp_path, **{"model": model, **change})


def test_an_edited_shard_is_refused(model, tmp_path):
    write(tmp_path, model)
    shard = tmp_path / shard_name(2)
    shard.write_text(shard.read_text().replace('"finished": false', '"finished": true', 1))
    with pytest.raises(UserError, match=r"shard-00002\.jsonl: is not as it was written"):
        list(read_generations(tmp_path))


def test_a_shard_of_another_model_does_not_pass(model, tmp_path):
    write(tmp_path / "a", model)
    write(tmp_path / "b", make_model(seed=5))
    for name in (shard_name(0), MANIFEST):
        (tmp_path / "a" / name).unlink()
    shutil.copy(tmp_path / "b" / shard_name(0), tmp_path / "a")
    with pytest.raises(UserError, match="answers without a manifest"):
        write(tmp_path / "a", model)
    write(tmp_path / "c", model)
    shutil.copy(tmp_path / "b" / shard_name(0), tmp_path / "c")
    with pytest.raises(UserError, match="an answer of another model"):
        write(tmp_path / "c", model)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(model, tmp_path, text):
    write(tmp_path, model)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        write(tmp_path, model)


def test_an_answer_depends_on_its_prompt_alone(model, tmp_path):
    """In float64, where no rounding reaches a border: whatever else is sampled, in whatever batches."""
    model = model.double()
    write(tmp_path / "all", model)
    write(tmp_path / "some", model, prompts=PROMPTS[7:3:-1], shard_size=3, batch_size=2)
    whole = {record["prompt"]: [] for record in read_generations(tmp_path / "all")}
    for record in read_generations(tmp_path / "all"):
        whole[record["prompt"]].append(record["text"])
    some = [(record["prompt"], record["text"]) for record in read_generations(tmp_path / "some")]
    assert some == [(prompt, text) for prompt in PROMPTS[7:3:-1] for text in whole[prompt]]


def test_two_ranks_write_the_same_bytes_as_one(tmp_path):
    on_two_ranks("-m", "tests.generation.worker", str(tmp_path / "two"))
    write(tmp_path / "one", make_model(vocab_size=len(make_tokenizer())))
    by_rank = json.loads((tmp_path / "two.json").read_text())
    assert by_rank == [[0, 2, 4], [1, 3, 5]]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_equal_prompts_have_different_answers(model, tokenizer):
    answers = generate(model, tokenizer, ["the cat"] * 3, max_new_tokens=10)
    assert len({tuple(answer.token_ids) for answer in answers}) == 3


def test_drawn_tokens_have_the_probabilities_of_the_model():
    scores = torch.tensor([[2.0, 0.0, -torch.inf, 1.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = DrawTokens(uniform, 3)(torch.zeros(20_000, 3), scores).argmax(-1)
    counts = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(counts, scores[0].softmax(-1), atol=0.012, rtol=0)
    assert counts[2] == 0
