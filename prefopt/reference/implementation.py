"""The code of a model, as far as it belongs to no library: a class from the Hub, or one of the user's own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from torch import nn
from torch.distributed.fsdp import FSDPModule

# Their releases keep what a model computes. Of all other code the source counts.
_LIBRARIES = {"torch", "transformers", "peft", "bitsandbytes", "builtins", "abc", "typing"}


def implementation(model: nn.Module) -> dict[str, Any]:
    """The name of a model's class, and hashes of the sources of all classes in it that belong to none of the libraries.

    Code that is not a library's moves: its module may be called after a folder and a commit, so it goes without.
    """
    kind = model_class(model)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    name = qualified_name(kind) if _is_of_library(kind) else kind.__qualname__
    return {"class": name, "sources": sources_of(classes)}


def sources_of(classes: Iterable[type]) -> list[str]:
    """Hashes of the sources of those of the classes that belong to none of the libraries."""
    return sorted({_hash_source(kind) for kind in classes if not _is_of_library(kind)})


def model_class(model: nn.Module) -> type:
    """The class of a model as it was before FSDP 2 put one of its own in front."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def qualified_name(kind: type) -> str:
    """The name of a class with that of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _hash_source(kind: type) -> str:
    """Of the file a class is in, or of its compiled code when it was typed into an interpreter."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return Hasher.hash(kind)
