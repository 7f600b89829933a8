"""A loss from a user's own file, `--plugin my_loss.py`: from then on it is a loss like any other.

A file may also hold functions that a recipe names, such as a judge of answers, or an environment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from prefopt.errors import UserError
from prefopt.losses.base import Loss
from prefopt.losses.registry import forget, registered_by

_PREFIX = "prefopt_plugin_"


def load_plugin(path: str | os.PathLike[str]) -> list[str]:
    """Run a Python file and give the names of the losses it registered.

    Loading the same file again replaces its losses. `UserError` when the file is missing, does not run, or registers
    nothing; a file without a loss may hold functions alone, or classes that are called like one.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"plugin {path}: there is no such file (looked at {file})")
    module = _module(file)
    _run(module, file)
    found = registered_by(module.__name__)
    if not found and not _holds_functions(module):
        raise UserError(
            f'plugin {file}: it registers no loss. Put @register("my_name"), from prefopt.losses, above the class. '
            "For a judge or an environment, write a function or a class whose name does not begin with an underscore."
        )
    return found


def plugin_file(loss: type) -> Path | None:
    """The file of a loss that `load_plugin` read; None for a loss of this or of another installed package."""
    file = getattr(sys.modules.get(loss.__module__), "__file__", None)
    return Path(file) if file and loss.__module__.startswith(_PREFIX) else None


def plugin_function(name: str) -> Callable[..., Any]:
    """The function `rules.py:kindness` of a file that `load_plugin` has read, or what else there can be called.

    Raises `UserError` for any other.
    """
    module, function = _module_with(name), name.rpartition(":")[2]
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"plugin {module.__file__}: it has no function `{function}`")
    return cast("Callable[..., Any]", found)


def _module_with(name: str) -> ModuleType:
    file = name.rpartition(":")[0]
    for module in reversed(list(sys.modules.values())):  # of two files of one name, the one that was read last
        path = getattr(module, "__file__", None)
        if getattr(module, "__name__", "").startswith(_PREFIX) and path and Path(path).name == Path(file).name:
            return module
    raise UserError(f"`{name}`: a recipe alone never imports code. Add --plugin {file or 'FILE.py'} to the command")


def function_file(name: str) -> Path:
    """The file of a function `rules.py:kindness`. Raises `UserError` as `plugin_function` does."""
    plugin_function(name)
    return Path(str(_module_with(name).__file__))


def function_hash(name: str) -> str:
    """SHA-256 (hex) of that file."""
    return hashlib.sha256(function_file(name).read_bytes()).hexdigest()


def _holds_functions(module: ModuleType) -> bool:
    """Whether a module has something public of its own to call, and no loss: one was meant and left unregistered."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    if any(isinstance(value, type) and issubclass(value, Loss) for value in own.values()):
        return False
    return any(callable(value) and not name.startswith("_") for name, value in own.items())


def _module(file: Path) -> ModuleType:
    """An empty module for the file, under a name that two files never share and one file keeps."""
    name = f"{_PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UserError(f"plugin {file}: it is not a Python file (.py)")
    return importlib.util.module_from_spec(spec)


def _run(module: ModuleType, file: Path) -> None:
    # Type hints of the knobs are looked up in sys.modules, so the module must be there before its classes are made.
    sys.modules.pop(module.__name__, None)
    sys.modules[module.__name__] = module
    try:
        assert module.__spec__ is not None and module.__spec__.loader is not None
        module.__spec__.loader.exec_module(module)
    except Exception as fault:
        forget(module.__name__)
        del sys.modules[module.__name__]
        raise UserError(f"plugin {file}{_where(fault, file)}: {_what(fault)}") from fault


def _where(fault: Exception, file: Path) -> str:
    if isinstance(fault, SyntaxError):
        return f":{fault.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(fault.__traceback__) if frame.filename == str(file)]
    return f":{lines[-1]}" if lines else ""


def _what(fault: Exception) -> str:
    if isinstance(fault, SyntaxError):
        return f"not valid Python: {fault.msg}"
    if isinstance(fault, TypeError) and "non-frozen dataclass" in str(fault):
        return "a loss is a frozen dataclass: write @dataclass(frozen=True) above the class"
    return str(fault) if isinstance(fault, UserError) else f"{type(fault).__name__}: {fault}"
