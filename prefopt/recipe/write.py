"""Plain values -> recipe text that reads back as the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from prefopt.recipe.problems import Place
from prefopt.recipe.tree import Text
from prefopt.recipe.values import Mismatch, untyped


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as something else, and repeats a value rather than pointing to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if _reads_as_itself(value) else '"')


def _reads_as_itself(value: str) -> bool:
    try:
        return bool(untyped(Text(value, False, Place(""))) == value)
    except Mismatch:
        return False


_Dumper.add_representer(str, _text)


def to_yaml(settings: Mapping[str, Any]) -> str:
    """The text of a recipe with these settings, in this order."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
