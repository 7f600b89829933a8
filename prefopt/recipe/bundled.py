"""The recipes that come with the package, found by their bare names: `prefopt train dpo`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prefopt.errors import RecipeError, nearest

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")
PACKAGE = Path(__file__).resolve().parents[1]
# Installed, the recipes lie inside the package; in a checkout, beside it.
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")
SUFFIXES = (".yaml", ".yml")
LAUNCH_SETTINGS = "accelerate"


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package; launch settings are not recipes."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if folder is None:
        return {}
    inside = {path.relative_to(folder): path for path in sorted(folder.rglob("*.yaml"))}
    return {name.with_suffix("").as_posix(): path for name, path in inside.items() if LAUNCH_SETTINGS not in name.parts}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of one that comes with the package.

    Raises `RecipeError` with the nearest name when there is none.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file, this takes any text
        return path
    if path.suffix in SUFFIXES:
        stem = f" `{path.stem}` comes with prefopt: write its bare name." if path.stem in bundled_recipes() else ""
        raise RecipeError(f"{name}: there is no such file.{stem}")
    known = bundled_recipes()
    if not all(NAME.fullmatch(part) for part in name.split("/")) or name not in known:
        raise RecipeError(f"{name}: there is no recipe of this name, and no such file.{nearest(name, known)}")
    return known[name]


def recipe_text(name: str) -> str:
    """The text of a recipe, comments included, to be copied and changed."""
    return read_text(find_recipe(name))


def read_text(path: Path) -> str:
    """The text of a recipe file. Raises `RecipeError` when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from None
