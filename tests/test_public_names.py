"""What the package shows: every public name is there, importing it is cheap, and the wheel holds every room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prefopt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "numpy", "matplotlib"}


@pytest.mark.parametrize("name", prefopt.__all__)
def test_every_public_name_is_there(name):
    assert getattr(prefopt, name) is not None


def test_public_names_are_the_documented_ones():
    expected = {"PreferenceConfig", "PreferenceTrainer", "UserError", "load_recipe", "make", "score_tokens"}
    assert expected <= set(prefopt.__all__) == set(dir(prefopt))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prefopt.no_such_name


@pytest.mark.parametrize("module", ["prefopt", "prefopt.errors", "prefopt.cli"])
def test_import_is_light(module):
    """`prefopt --help` answers at once; what is heavy waits for the command that needs it."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "prefopt" in found.stdout.split()
    assert not HEAVY & set(found.stdout.split())


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom prefopt.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        f"assert not {HEAVY} & set(sys.modules), sys.modules.keys()"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert "recipe" in found.stdout


SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where the files of a package lie in the checkout."""
    return ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))


def test_the_package_list_is_whole():
    """The list is written by hand, because the recipes move into the package from a folder beside it."""
    modules = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "prefopt").rglob("__init__.py")}
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    configs = {".".join(("prefopt", *folder.parts)) for folder in folders}
    listed = SETUPTOOLS["packages"]
    # The folders below `configs` may be packages of their own, or data of the one above.
    assert modules | {"prefopt.configs"} <= set(listed) <= modules | configs
    assert len(set(listed)) == len(listed)
    assert all(folder_of(package).is_dir() for package in listed)


def test_every_folder_of_the_package_is_a_package():
    """A folder of modules without `__init__.py` works from a checkout and is missing from the wheel."""
    holders = {path.parent for path in (ROOT / "prefopt").rglob("*.py")}
    assert not [str(folder) for folder in holders if not (folder / "__init__.py").is_file()]


def test_every_recipe_is_in_the_wheel():
    packed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    assert set((ROOT / "configs").rglob("*.yaml")) <= packed
    assert ROOT / "prefopt/losses/README.md" in packed


def test_scripts_lead_somewhere():
    for target in PROJECT["project"]["scripts"].values():
        module, name = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_version_is_said_once():
    assert prefopt.__version__ == PROJECT["project"]["version"]
