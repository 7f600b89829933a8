"""The README is true: its tables are those of the code, its links lead somewhere, and its examples are run."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prefopt import cli
from prefopt.data import load_examples
from prefopt.data.spec import DataSpec
from prefopt.errors import UserError
from prefopt.losses import Needs, load_plugin, make, names
from prefopt.losses.registry import forget
from prefopt.recipe import bundled_recipes, load_recipe
from prefopt.report import readme
from tests.helpers import make_model, make_tokenizer
from tests.losses.views import random_micro
from tests.oracle import test_against_trl

TEXT = readme.README.read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
OWN_LOSS = "# my_loss.py\n"


def blocks(language: str) -> list[str]:
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    """Every `prefopt` command of the README, in order, and every script that stands for one."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^\| `(accelerate launch [^`]+)` \|", TEXT, re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:2] == ["accelerate", "launch"]:
            place = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
            assert (readme.ROOT / words[place]).is_file(), line
            assert all((readme.ROOT / word).is_file() for word in words[:place] if word.endswith(".yaml")), line
            words = ["prefopt", Path(words[place]).stem, *words[place + 1 :]]
        if words[:1] == ["prefopt"]:
            yield words[1:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the recipes and the plugin that the README's commands name."""
    (tmp_path / "configs").symlink_to(readme.ROOT / "configs")
    (tmp_path / "my_loss.py").write_text(next(block for block in blocks("python") if block.startswith(OWN_LOSS)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_loss(folder: Path) -> Iterator[str]:
    """The name of the README's own loss, registered while the test runs."""
    name = load_plugin(folder / "my_loss.py")[0]
    yield name
    forget(type(make(name)).__module__)


def test_generated_parts_are_those_of_the_code():
    assert readme.renewed(TEXT) == TEXT, "run: python -m prefopt.report.readme --write"


def test_an_old_part_is_noticed_and_rewritten(tmp_path, monkeypatch, capsys):
    old = tmp_path / "README.md"
    old.write_text("before\n<!-- generated: losses -->\n| gone |\n<!-- end -->\nafter\n")
    monkeypatch.setattr(readme, "README", old)
    assert readme.main([]) == 1
    assert "--write" in capsys.readouterr().err
    assert readme.main(["--write"]) == 0
    assert readme.main([]) == 0
    new = old.read_text()
    assert "gone" not in new
    paper = "[arXiv 2305.18290](https://arxiv.org/abs/2305.18290), eq. 7"
    assert f"{paper} | pairs | reference log-probs | [preference] | beta 0.1 | formula, TRL's `sigmoid` |" in new
    assert "[keeps chosen answers likely where DPO does not](examples/claims/near_identical_pairs.py): seen |" in new
    assert (new.startswith("before\n"), new.endswith("\nafter\n")) == (True, True)


# Claims of how a model is trained over several rounds, not of a loss.
OF_PROCEDURES = {"spin_rounds", "spin_reviews", "easy_to_hard", "stepwise_reviews"}


def test_evidence_is_of_losses_and_tests_that_there_are():
    evidence = json.loads(readme.EVIDENCE.read_text())
    cases = [*test_against_trl.WITH_REFERENCE, *test_against_trl.WITHOUT_REFERENCE, test_against_trl.KTO]
    compared = {name for case in cases for _, name, _ in case.terms}
    assert {name for name, found in evidence.items() if "trl" in found} == compared
    claims = {script for found in evidence.values() for script, _, _ in found.get("claims", ())}
    scripts = {path.stem: path.read_text() for path in (readme.ROOT / "examples/claims").glob("*.py")}
    judged = {name for name, text in scripts.items() if re.search(r"^from common import .*\bconclude\b", text, re.M)}
    assert judged and judged - OF_PROCEDURES <= claims <= scripts.keys()
    assert evidence.keys() <= set(names())


def test_only_a_loss_with_a_formula_is_said_to_have_one(tmp_path, monkeypatch):
    (tmp_path / "float64.py").write_text("def here(pair): ...\n")
    (tmp_path / "test_own.py").write_text("FACTS = Facts(at_the_reference=math.log(2), formula=formula)\n")
    (tmp_path / "test_none.py").write_text('FACTS = Facts(no_formula="a reason")\nother(formula=1)\n')
    monkeypatch.setattr(readme, "FORMULAS", tmp_path / "float64.py")
    monkeypatch.setattr(readme, "OWN_TESTS", tmp_path)
    names = ("here", "own", "none", "untested")
    assert [readme._oracle(name, {}) for name in names] == ["formula", "formula", "", ""]
    assert readme._oracle("none", {"trl": "x"}) == "TRL's `x`"


def test_a_part_that_nothing_generates_is_refused():
    with pytest.raises(UserError, match=r"nothing generates `loses`\. Did you mean `losses`"):
        readme.renewed("<!-- generated: loses -->\n<!-- end -->")


def test_every_generated_part_is_used():
    assert set(re.findall(r"<!-- generated: (\w+) -->", TEXT)) == set(readme.PARTS)


def test_links_lead_to_files_and_headings():
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if not target.startswith("http")]
    assert targets
    for target in targets:
        found = target[1:] in headings if target.startswith("#") else (readme.ROOT / target).exists()
        assert found, target


def test_files_and_recipes_named_in_the_text_exist():
    named = re.findall(r"(?:configs|scripts|examples|tests|prefopt)/[\w/-]+(?:\.\w+)?", TEXT)
    missing = [name for name in named if not (readme.ROOT / name).exists()]
    assert not missing
    recipes = {Path(name).stem for name in named if re.fullmatch(r"configs/\w+\.yaml", name)}
    assert recipes <= set(bundled_recipes())


def test_what_a_loss_may_read_is_there_to_be_read():
    """Everything the table of a view's parts names."""
    table = TEXT.split("## Add a loss")[1].split("\n## ")[0]
    micro = random_micro(columns=("x",))
    pairs = micro.view(
        Needs(reference="distribution", statistics=("forward_kl", "entropy"), columns=("x",), turns=True)
    )
    single = micro.view(Needs(view="completions"))
    named = re.findall(r"`((?:view|scores)\.[^`]+)`", table)
    assert len(named) >= 12
    for expression in named:
        view = single if expression in ("view.scores", "view.labels") else pairs
        assert eval(expression, {"view": view, "scores": pairs.chosen}) is not None, expression
    for declaration in re.findall(r"^\|[^|]*\| `([^`]+)` \|", table, re.MULTILINE):
        assert eval(f"Needs({declaration})", {"Needs": Needs})


def test_every_command_is_one_the_program_takes(folder, own_loss, capsys):
    seen = set()
    for words in commands():
        arguments, target = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        options, rest = cli._parser().parse_known_args(arguments)
        seen.add(arguments[0])
        if arguments[0] in ("train", "explain", "inspect"):
            # The recipe that a run leaves in its folder is the one it was made by.
            load_recipe(re.sub(r"^runs/(\w+)/recipe.yaml$", r"\1", options.recipe), rest)
        else:
            assert not rest, arguments
        if target:
            capsys.readouterr()
            assert cli.main(arguments) == 0
            (folder / target).write_text(capsys.readouterr().out)
    assert seen == {"train", "explain", "recipe", "losses", "evaluate", "cache", "push", "segments", "inspect"}


def test_recipes_in_the_text_load(folder):
    assert blocks("yaml")
    for number, block in enumerate(blocks("yaml")):
        (folder / f"{number}.yaml").write_text(block)
        recipe = load_recipe(folder / f"{number}.yaml")
        assert set(yaml.safe_load(block)) <= set(recipe.as_written())


def test_rows_in_the_text_are_rows(tmp_path):
    assert len(blocks("json")) == 3
    for number, block in enumerate(blocks("json")):
        (tmp_path / f"{number}.jsonl").write_text(block)
        declared = ("segments",) if '"segments"' in block else ()
        loaded = load_examples(DataSpec(data_files=str(tmp_path / f"{number}.jsonl")), required_columns=declared)
        assert len(loaded.examples) == len(block.splitlines())
        assert not loaded.report.notes


def test_python_in_the_text_runs(folder, own_loss, capsys):
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    programs = [block for block in blocks("python") if not block.startswith(OWN_LOSS)]
    assert any(MODEL in program for program in programs)
    for program in programs:
        (folder / "program.py").write_text(program.replace(f'"{MODEL}"', '"tiny"'))
        runpy.run_path(str(folder / "program.py"))
    margin = 0.1 * ((0.2 + 0.2) - (-0.5 + 0))  # beta times the difference of the log-ratios of the first pair
    printed = f"tensor([{math.log1p(math.exp(-margin)):.4f}, {math.log(2):.4f}])"
    assert printed in programs[-1]
    assert printed in capsys.readouterr().out
    assert (folder / "runs" / "python" / "model.safetensors").is_file()


def test_the_loss_of_the_text_is_what_it_says(own_loss):
    assert own_loss == "squared_margin"
    assert "one short file" in TEXT
    assert len(next(block for block in blocks("python") if block.startswith(OWN_LOSS)).splitlines()) < 25


def test_defaults_are_what_a_resolved_recipe_shows(folder):
    (folder / "plain.yaml").write_text(
        json.dumps({"model_name_or_path": "m", "data_files": "p", "loss": {"name": "sft"}})
    )
    shown = load_recipe("plain.yaml").resolved()
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", readme.defaults_table(), re.MULTILINE))
    assert {name: readme._value(shown[name]) for name in table} == table
