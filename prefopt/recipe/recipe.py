"""`Recipe`: what a run is, as frozen data, and the way there from a file and options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config import PreferenceConfig, shown_defaults
from prefopt.data.spec import DataSpec
from prefopt.losses import Objective, make
from prefopt.losses.knobs import knobs_of
from prefopt.recipe.bundled import find_recipe, read_text
from prefopt.recipe.checks import ADAPTER, build_objective, check
from prefopt.recipe.overrides import apply, split_options
from prefopt.recipe.problems import Problems
from prefopt.recipe.read import Draft, read, training_types
from prefopt.recipe.sections import DataSection, LossSpec, ModelSection, ReferenceSection
from prefopt.recipe.tree import parse
from prefopt.recipe.write import to_yaml


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything about a run. Two recipes are equal when they resolve to the same settings.

    `training` holds only what was written, so that `PreferenceConfig` stays the only place of its defaults.
    `name` is the stem of the file, and of the run folder when `output_dir` is not set.
    """

    model: ModelSection
    data: DataSection
    loss: tuple[LossSpec, ...]
    training: dict[str, Any] = field(default_factory=dict)
    loss_weights: tuple[float, ...] | None = None
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    procedure: dict[str, Any] = field(default_factory=dict)
    name: str = "recipe"

    @property
    def output_dir(self) -> str:
        """The run folder: `runs/<name>` unless set."""
        return str(self.training.get("output_dir") or f"runs/{self.name}")

    def objective(self) -> Objective:
        """The losses with their knobs and weights, ready to be called."""
        return build_objective(self.loss, list(self.loss_weights) if self.loss_weights else None)

    def training_arguments(self, **extra: Any) -> PreferenceConfig:
        """The settings as the trainer takes them; `extra` goes over what the recipe says."""
        # A script in Python minds its own signals unless it says otherwise.
        settings: dict[str, Any] = {"enable_jit_checkpoint": True, **self.training, "output_dir": self.output_dir}
        if self.loss_weights:
            settings["loss_weights"] = list(self.loss_weights)
        if self.reference != ReferenceSection():
            settings["reference"] = _written(self.reference)
        return PreferenceConfig(**{**settings, **extra})

    def resolved(self) -> dict[str, Any]:
        """The recipe in full, as plain values: with every knob of its losses and the defaults that matter."""
        losses = [_with_defaults(loss) for loss in self.loss]
        flat = {**self._blocks(), "loss": losses if len(losses) > 1 else losses[0]}
        if self.objective().reference != "none":
            flat["reference"] = {"source": self.reference.source, **_written(self.reference)}
        return {**flat, "output_dir": self.output_dir, **shown_defaults(), **self.training}

    def as_written(self) -> dict[str, Any]:
        """The recipe as plain values; of model, data and reference only what is not at its default."""
        return {**self._blocks(), **self.training}

    def _blocks(self) -> dict[str, Any]:
        """Everything but the training settings."""
        losses = [{"name": loss.name, **loss.knobs} for loss in self.loss]
        flat = {**_written(self.model), **_written(self.data), "loss": losses if len(losses) > 1 else losses[0]}
        if self.loss_weights:
            flat["loss_weights"] = list(self.loss_weights)
        if self.reference != ReferenceSection():
            flat["reference"] = _written(self.reference)
        if self.procedure:
            flat["procedure"] = self.procedure
        return flat

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write the resolved recipe as YAML. Loading that file gives an equal recipe."""
        Path(path).write_text(to_yaml(self.resolved()), encoding="utf-8")

    def data_spec(self) -> DataSpec:
        """What the data room loads: training rows, and test rows where the recipe evaluates or names some."""
        return self.data.spec(evaluate=self.evaluates)

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates, on a schedule or because the recipe names rows for it."""
        return self.training.get("eval_strategy", "no") != "no" or self.data.has_test_rows

    def replace(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> Recipe:
        """A recipe with other settings, by their names in a recipe file; None or an empty block takes a setting out.

        `loss`, `reference` and `procedure` are given as whole blocks; without `use_peft` the settings of the adapter
        go too. The result is checked like a file. Raises `RecipeError`.
        """
        changes = {**(changes or {}), **more}
        flat = {**self.as_written(), **changes}
        if changes.get("use_peft") is False:
            flat = {name: value for name, value in flat.items() if name not in ADAPTER or name in changes}
        kept = {name: value for name, value in flat.items() if not _taken_out(name, value)}
        return _load(to_yaml(kept), f"recipe {self.name}", (), self.name, numbered=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    __hash__ = None  # type: ignore[assignment]


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a recipe that comes with the package by its bare name, with options laid over it.

    `overrides` are arguments of a command line: `["--loss.beta", "0.2", "--bf16=false"]`. They win over the file, and
    the file over the defaults. Raises `RecipeError` with one line for every problem: place, setting, reason, remedy.
    """
    file = find_recipe(os.fspath(path))
    return _load(read_text(file), str(file), overrides, file.stem)


def _load(text: str, source: str, overrides: Sequence[str], name: str, *, numbered: bool = True) -> Recipe:
    problems = Problems()
    tree = parse(text, source, problems, numbered=numbered)
    tree = apply(tree, split_options(overrides, problems), problems)
    draft = read(tree, source, problems)
    check(draft, problems)
    problems.refuse()
    return _build(draft, name)


def _build(draft: Draft, name: str) -> Recipe:
    return Recipe(
        model=ModelSection(**draft.model),
        data=DataSection(**draft.data),
        loss=tuple(draft.losses),
        training=draft.training,
        loss_weights=tuple(draft.loss_weights) if draft.loss_weights else None,
        reference=ReferenceSection(**(draft.reference or {})),
        procedure=draft.procedure,
        name=name,
    )


def _taken_out(name: str, value: Any) -> bool:
    # A training setting may be null on purpose (`max_length`); everywhere else null is the same as not written.
    return (value is None and name not in training_types()) or value == {}


def _with_defaults(loss: LossSpec) -> dict[str, Any]:
    made = make(loss.name, **loss.knobs)
    return {"name": loss.name, **{knob.name: getattr(made, knob.name) for knob in knobs_of(type(made))}}


def _written(section: Any) -> dict[str, Any]:
    """The fields of a section that are not at their defaults, as plain values."""
    values = [(field, getattr(section, field.name)) for field in dataclasses.fields(section)]
    return {field.name: _plain(value) for field, value in values if value != field.default}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _written(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return getattr(value, "value", value)
