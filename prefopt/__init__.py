"""prefopt: preference optimisation of language models, exact and fast. Names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PreferenceConfig": "prefopt.config",
    "PreferenceTrainer": "prefopt.trainer",
    "UserError": "prefopt.errors",
    "load_recipe": "prefopt.recipe",
    "make": "prefopt.losses",
    "score_tokens": "prefopt.scoring",
}
__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
