"""What a stage depends on, by name: its settings, and the content of the local files it reads."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils.sha import sha_fileobj

from prefopt.drift import FREE, as_facts, loss_facts
from prefopt.errors import UserError
from prefopt.losses.plugins import function_file, plugin_file
from prefopt.procedures.stage import MakeStage, Stage
from prefopt.report.card import PLUGINS

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

# Where the scores of a reference come from decides nothing but the time they take.
_FREE_OF_REFERENCE = ("source", "form", "store", "max_gb", "batch_size")
_MODEL = (
    "*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json", "adapter_config.json", "tokenizer*",
    "chat_template*", "vocab*", "merges.txt",
)  # fmt: skip
_WHOLE = 2**23  # bytes up to which a file of a model is read whole
_SAMPLES, _SAMPLE = 64, 2**16


def inputs_of(stage: Stage) -> dict[str, Any]:
    """The facts of a stage as strict JSON without secrets; the model or data of an earlier stage must be there by now.

    Data files and plugins are hashed whole, the weights of a local model by samples: one that was trained again differs
    nearly everywhere.
    """
    if isinstance(stage, MakeStage):
        return as_facts({**stage.settings, **stage.inputs()})
    recipe = stage.recipe
    resolved = recipe.resolved()
    settings = {name: value for name, value in resolved.items() if name not in FREE}
    reference = {name: value for name, value in resolved.get("reference", {}).items() if name not in _FREE_OF_REFERENCE}
    # By loss and not by path: the same file in another folder is the same formula.
    plugins = {name: sha256_of(file) for name, file in plugin_files(recipe).items()}
    own = {**loss_facts(recipe.objective()), "plugin": plugins, "reference": reference}
    return as_facts({**settings, **own, **contents_of(recipe)})


def contents_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Hashes of the local files that a recipe reads: of its data, whole, and of its models, by samples."""
    template = recipe.model.chat_template_path
    data = [*recipe.data.local_files(), *([Path(template)] if template else [])]
    models = (recipe.model.model_name_or_path, recipe.reference.model)
    return {
        "data": {str(file): sha256_of(file) for file in data},
        "model": {name: sampled(Path(name)) for name in models if name and Path(name).is_dir()},
    }


def model_files(folder: Path) -> list[Path]:
    """The files that a model, an adapter or a tokenizer is loaded from."""
    return sorted({path for pattern in _MODEL for path in folder.glob(pattern) if path.is_file()})


def sampled(folder: Path) -> str:
    """A hash of the files that a model is loaded from: small ones whole, of large ones the length and samples."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in [0] if size <= _WHOLE else range(0, size, size // _SAMPLES):
                file.seek(start)
                digest.update(file.read(_WHOLE if size <= _WHOLE else _SAMPLE))
    return digest.hexdigest()


def plugin_files(recipe: Recipe) -> dict[str, Path]:
    """Loss -> its file, for losses from outside the package: another formula under the same name is another run."""
    found = {}
    for loss in recipe.objective().losses:
        module = type(loss).__module__
        file = getattr(sys.modules[module], "__file__", None)
        if not module.startswith("prefopt.") and file:
            found[loss.name] = Path(file)
    return found


def keep_plugins(recipe: Recipe, functions: Iterable[str] = ()) -> None:
    """Copy the plugins of a recipe's losses into its run folder, where the recipe alone would not make the run again.

    `functions`: names of functions in plugins that the recipe names as well. `UserError` for two files of one name, of
    which the second would be kept for both.
    """
    losses = [plugin_file(type(loss)) for loss in recipe.objective().losses]
    kept: dict[str, Path] = {}
    for file in (*losses, *map(function_file, functions)):
        if file is not None and kept.setdefault(file.name, file) != file:
            raise UserError(f"--plugin: {file} and {kept[file.name]} have the same name. Rename one of them.")
    for name, file in kept.items():
        copy = Path(recipe.output_dir) / PLUGINS / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()
