"""Who may import whom. A line that breaks the rules is named with its file and number."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prefopt"

# A module may not import anything that starts with one of these.
FORBIDDEN = {
    "losses": ["transformers", "accelerate", "datasets", "trl", "peft", "numpy", "torch.distributed", "logging"],
    "data": ["prefopt.models", "prefopt.losses", "prefopt.trainer", "prefopt.scoring", "prefopt.reference"],
    "scoring": ["prefopt.data", "prefopt.losses", "prefopt.trainer", "prefopt.reference", "trl"],
    "recipe": ["prefopt.trainer", "prefopt.scoring", "prefopt.models", "prefopt.procedures"],
    "reference": ["prefopt.losses", "prefopt.trainer"],
    "trainer.py": ["prefopt.procedures", "prefopt.report", "prefopt.recipe", "prefopt.world"],
    "world": ["prefopt.trainer", "prefopt.procedures"],
}
# These import nothing of prefopt but what is listed.
ONLY = {
    "losses": ["prefopt.losses", "prefopt.scoring.scores", "prefopt.errors"],
    "errors.py": [],
    "metrics.py": [],
    "data": ["prefopt.data", "prefopt.errors", "prefopt.config"],
}


def modules(part: str) -> list[Path]:
    path = PACKAGE / part
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found, f"no module in {part}: has it moved?"
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full name of the module"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, parents: list[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_forbidden_imports(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules(part)
        for line, name in imports(path)
        if within(name, FORBIDDEN[part])
    ]
    assert not wrong


@pytest.mark.parametrize("part", ONLY)
def test_only_these_rooms(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules(part)
        for line, name in imports(path)
        if name.startswith("prefopt.") and not within(name, ONLY[part])
    ]
    assert not wrong


def test_only_one_file_opens_weights():
    loaders = {"AutoModelForCausalLM", "from_pretrained"}
    users = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(node, ast.Name) and node.id in loaders for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert sorted(users) == ["explain.py", "models.py", "scratch.py"]


def test_nothing_outside_the_losses_room_asks_for_a_loss_by_name():
    """`sft` is the one name procedures may write: it is the loss of a supervised start."""
    names = {path.stem for path in (PACKAGE / "losses").glob("*.py")} & {"dpo"}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in ("losses",) or path.name in ("trainer.py", "renamed.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            compared = isinstance(node, ast.Compare) and [node.left, *node.comparators]
            for side in compared or []:
                if isinstance(side, ast.Constant) and side.value in names:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_top_level_is_the_seven_entries():
    allowed = {"pyproject.toml", "README.md", "LICENSE", "prefopt", "configs", "scripts", "tests", "examples"}
    generated = {"build", "runs", "prefopt.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert found - generated <= allowed
