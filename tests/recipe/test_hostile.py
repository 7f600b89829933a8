"""Whatever a recipe file holds, the answer is a `RecipeError`: nothing runs, nothing hangs, no token is repeated."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from prefopt.errors import RecipeError
from prefopt.recipe import load_recipe
from tests.recipe.mistakes import BASE

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


def refusal(file: Path, *options: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(file, options)
    return str(raised.value)


@pytest.mark.parametrize(
    "line",
    [
        f"run_name: {TOKEN}",
        f"hub_token: {TOKEN}",
        f"{TOKEN}: 1",
        f"loss: {{name: dpo, {TOKEN}: 1}}",
        f"learning_rate: [{TOKEN}]",
        f"lr_scheduler_kwargs: {{a: [b, {TOKEN}]}}",
        f"run_name: *{TOKEN}",
        f"run_name: !{TOKEN} x",
        f"seed: {TOKEN}",
        f"run_name: 'user:{TOKEN}@host'",
        f'run_name: "unclosed {TOKEN}',
    ],
)
def test_a_token_is_refused_and_never_repeated(tmp_path, line):
    file = tmp_path / "recipe.yaml"
    text = BASE.replace("loss:\n  name: dpo\n  beta: 0.1\n", "") if line.startswith("loss") else BASE
    file.write_text(f"{text}{line}\n")
    assert TOKEN not in refusal(file)


@pytest.mark.parametrize("options", [["--run_name", TOKEN], [f"--{TOKEN}", "1"], [TOKEN], [f"--run_name=[{TOKEN}]"]])
def test_nor_from_the_command_line(tmp_path, options):
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    assert TOKEN not in refusal(file, *options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "just text",
        "[a, b]",
        "a: b: c",
        "a:\n\t- b",
        "--- a\n--- b",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "? [a]\n: b",
        "x: *nowhere",
        "run_name: \x07",
        'run_name: "\\0"',
        "{" * 2000,
        "[" * 2000 + "]" * 2000,
        "a: " * 2000,
        "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
        "run_name: !!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system x: 1",
        "run_name: !!binary aGVsbG8=",
        "<<: {a: 1}",
        "x" * 2_000_000,
        "seed: " + "9" * 100_000,
    ],
)
def test_strange_files(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    answer = refusal(Path("recipe.yaml"))
    assert answer.startswith("recipe.yaml")
    assert len(answer) < 20_000
    assert not Path("owned").exists()


def test_other_encodings(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(BASE.encode("utf-16"))
    assert "not UTF-8" in refusal(file)
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe(file).training["max_length"] == 1024


def test_anchors_are_fine(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE + "seed: &seed 3\ndata_seed: *seed\n")
    assert load_recipe(file).training["data_seed"] == 3


def test_random_damage(tmp_path):
    """Lines shuffled, cut, doubled, and salted with YAML's own characters: read or refused, nothing else."""
    file = tmp_path / "recipe.yaml"
    rng = random.Random(0)
    salt = [*":-[]{}#&*!|>'\"%@`,?~\\\n\t ", "1e9", "null", "<<", "é", "\u2028", "0x", "---", "..."]
    for _ in range(500):
        text = list(BASE)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choice(salt) * rng.randint(1, 3)
        file.write_text("".join(text), encoding="utf-8")
        try:
            load_recipe(file)
        except RecipeError as error:
            assert str(error)
