"""Losses. Every module of this folder is imported here, so a loss is registered by existing.

`make("dpo", beta=0.2)(Pairs(chosen, rejected)).loss` is all there is to it: no trainer, no model.
"""

from __future__ import annotations

import importlib
import pkgutil

from prefopt.losses.base import Loss, LossOutput, Needs
from prefopt.losses.knobs import knob
from prefopt.losses.objective import Objective, Sides, sides_of
from prefopt.losses.plugins import load_plugin
from prefopt.losses.registry import get, make, names, register
from prefopt.losses.views import Completions, Pairs

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Completions",
    "Loss",
    "LossOutput",
    "Needs",
    "Objective",
    "Pairs",
    "Sides",
    "get",
    "knob",
    "load_plugin",
    "make",
    "names",
    "register",
    "sides_of",
]
