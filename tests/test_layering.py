"""Who may import whom. A line that breaks the rules is named with its file and number."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.losses import get, names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prefopt"

# A module may not import anything that starts with one of these.
FORBIDDEN = {
    "losses": ["transformers", "accelerate", "datasets", "trl", "peft", "numpy", "torch.distributed", "logging"],
    "data": ["prefopt.models", "prefopt.losses", "prefopt.trainer", "prefopt.scoring", "prefopt.reference"],
    "scoring": ["prefopt.data", "prefopt.losses", "prefopt.trainer", "prefopt.reference"],
    "recipe": ["prefopt.trainer", "prefopt.scoring", "prefopt.models", "prefopt.procedures"],
    "reference": ["prefopt.losses", "prefopt.trainer", "prefopt.procedures"],
    "hub": ["prefopt.procedures", "prefopt.losses", "prefopt.scoring", "prefopt.reference", "prefopt.world"],
    "durable.py": ["prefopt.losses", "prefopt.reference.live", "prefopt.scoring", "prefopt.procedures"],
    "trainer.py": ["prefopt.procedures", "prefopt.report", "prefopt.recipe", "prefopt.world"],
    "checks.py": ["prefopt.procedures", "prefopt.report", "prefopt.recipe", "prefopt.world"],
    "models.py": ["prefopt.trainer", "prefopt.data", "prefopt.losses", "prefopt.reference"],
    "evaluation.py": ["prefopt.trainer", "prefopt.procedures", "prefopt.recipe"],
    "world": ["prefopt.trainer", "prefopt.procedures"],
    "environments": ["prefopt.trainer", "prefopt.procedures"],
}
# These import nothing of prefopt but what is listed.
ONLY = {
    "losses": ["prefopt.losses", "prefopt.scoring.scores", "prefopt.errors"],
    "errors.py": [],
    "checkpoints.py": ["prefopt.errors"],
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


# A benchmark measures losses by name; no run passes through it.
MAY_NAME = {"losses", "benchmark"}


def outside_losses() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not MAY_NAME & set(path.relative_to(PACKAGE).parts)]


# The trainer's default is TRL's, a supervised start is one by name, and older names are answered with today's.
NAMED = {("trainer.py", "dpo"), ("procedures/single.py", "sft")}
TRANSLATES = "recipe/renamed.py"


def test_no_loss_is_named_outside_its_room():
    """Where no name is written, no name can be asked for: each registered loss is treated like any other."""
    found = {
        (str(path.relative_to(PACKAGE)), node.value)
        for path in outside_losses()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names()
    }
    assert {(path, name) for path, name in found if path != TRANSLATES} == NAMED


def test_no_loss_is_compared_with_outside_its_room():
    """The names above are given to someone; a comparison, or a match, would be a branch for one loss."""
    wrong = []
    for path in outside_losses():
        for node in ast.walk(ast.parse(path.read_text())):
            asked = node if isinstance(node, (ast.Compare, ast.MatchValue)) else None
            constants = [part.value for part in ast.walk(asked) if isinstance(part, ast.Constant)] if asked else []
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in constants if name in names()]
    assert not wrong


def test_no_loss_is_imported_outside_its_room():
    """An `isinstance` would be a comparison too, and needs the class."""
    concrete = [get(name).__module__ for name in names()]
    assert len(concrete) >= 2 and all(module.startswith("prefopt.losses.") for module in concrete)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in outside_losses()
        for line, name in imports(path)
        if within(name, concrete)
    ]
    assert not wrong


EXTRAS = ["matplotlib", "jinja2", "bitsandbytes", "deepspeed", "triton"]


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: not the bodies of functions, nor what is there for a type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from at_import(node)


def test_what_may_be_missing_is_not_needed_to_import():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in at_import(ast.parse(path.read_text())):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in named if within(name, EXTRAS)]
    assert not wrong


def test_the_walk_sees_every_way_to_import(tmp_path):
    """Guards that see nothing pass for ever."""
    code = "import a.b\nfrom c import d\ndef f():\n    from e.f import g\nclass K:\n    import h\n"
    (tmp_path / "module.py").write_text(code)
    found = {name for _, name in imports(tmp_path / "module.py")}
    assert found == {"a.b", "c", "c.d", "e.f", "e.f.g", "h"}
    seen = {node.lineno for node in at_import(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert seen == {1, 2, 6}
    assert within("a.b.c", ["a.b"]) and within("a.b", ["a.b"]) and not within("a.bc", ["a.b"])


def test_top_level_is_the_seven_entries():
    allowed = {"pyproject.toml", "README.md", "LICENSE", "prefopt", "configs", "scripts", "tests", "examples"}
    generated = {"build", "runs", "prefopt.egg-info"}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    assert found - generated <= allowed
