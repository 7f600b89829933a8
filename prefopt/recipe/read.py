"""The tree of a recipe -> a draft: each setting read by its own type and range. What fits together is checked after."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from prefopt.config import PreferenceConfig
from prefopt.errors import nearest
from prefopt.losses import names
from prefopt.recipe.fields import read_section, read_value
from prefopt.recipe.loss_block import knob_names, misplaced_knob, read_losses
from prefopt.recipe.problems import Place, Problems
from prefopt.recipe.renamed import RENAMED, RETIRED, loss_type_remedy, remedy
from prefopt.recipe.sections import DataSection, DatasetEntry, LossSpec, ModelSection, ReferenceSection
from prefopt.recipe.tree import Block, Items, Node, Text, is_null
from prefopt.settings import field_problem

MIXTURES = ("datasets", "targets")
BLOCKS = ("loss", "loss_weights", "reference", "procedure")


@dataclass
class Draft:
    """Settings read so far, only those that were written. `given` says where each of them stands."""

    source: str
    given: dict[str, Place]
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    losses: list[LossSpec] = field(default_factory=list)
    loss_weights: list[float] | None = None
    reference: dict[str, Any] | None = None
    procedure: dict[str, Any] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """Where a setting was written, or the file as a whole when it was not."""
        return self.given.get(name, Place(self.source))


def read(tree: Block, source: str, problems: Problems) -> Draft:
    """Read every setting of a recipe; what cannot be read is added to `problems` and left out of the draft."""
    entries = tree.entries
    draft = Draft(source, {name: node.place for name, node in entries.items()})
    draft.model = read_section(ModelSection, entries, problems)
    draft.data = read_section(DataSection, entries, problems, besides=MIXTURES)
    for name in MIXTURES:
        if name in entries and not is_null(entries[name]):
            draft.data[name] = _mixture(name, entries[name], problems)
    draft.training = _training(entries, problems)
    draft.losses = read_losses(entries, problems)
    if "loss_weights" in entries:
        draft.loss_weights = read_value("loss_weights", entries["loss_weights"], list[float] | None, problems)
        _check_training("loss_weights", draft.loss_weights, entries["loss_weights"], problems)
    draft.reference = _reference(entries, problems)
    draft.procedure = _procedure(entries, source, problems)
    for name, node in entries.items():
        if name not in known_names():
            problems.add(node.place, name, _unknown(name, node, entries))
    return draft


@functools.cache
def known_names() -> tuple[str, ...]:
    """Every name that may stand at the top level of a recipe."""
    sections = [field.name for section in (ModelSection, DataSection) for field in dataclasses.fields(section)]
    return (*sections, *BLOCKS, *training_types())


@functools.cache
def training_types() -> Mapping[str, Any]:
    """The settings of `PreferenceConfig` a recipe may write, with their declared types."""
    hints = get_type_hints(PreferenceConfig)
    fields = [field.name for field in dataclasses.fields(PreferenceConfig) if field.init]
    return {name: hints[name] for name in fields if name not in {*RENAMED, *RETIRED, *BLOCKS}}


def _training(entries: Mapping[str, Node], problems: Problems) -> dict[str, Any]:
    read = {}
    for name, hint in training_types().items():
        if name not in entries:
            continue
        before = len(problems)
        value = read_value(name, entries[name], hint, problems)
        if len(problems) == before:
            _check_training(name, value, entries[name], problems)
        if len(problems) == before:
            read[name] = value
    return read


def _check_training(name: str, value: Any, node: Node, problems: Problems) -> None:
    reason = field_problem(name, value)
    if reason:
        problems.add(node.place, name, reason)


def _mixture(name: str, node: Node, problems: Problems) -> tuple[DatasetEntry, ...]:
    if not isinstance(node, Items) or not node.items:
        problems.add(node.place, name, "expected a list of {path, data_files, split, fraction, ...}.")
        return ()
    read = []
    for index, item in enumerate(node.items):
        path = f"{name}.{index}"
        if not isinstance(item, Block):
            problems.add(item.place, path, "expected a block with `path` or `data_files`.")
            continue
        settings = read_section(DatasetEntry, item.entries, problems, inside=path)
        if not {"path", "data_files"} & item.entries.keys():
            problems.add(item.place, path, "`path` is missing. Write a Hub dataset or a local folder, or data_files.")
        read.append(DatasetEntry(**settings))
    return tuple(read)


def _reference(entries: Mapping[str, Node], problems: Problems) -> dict[str, Any] | None:
    node = entries.get("reference")
    if node is None or is_null(node):
        return None
    if not isinstance(node, Block):
        problems.add(node.place, "reference", "expected a block. Write reference: {source: auto} or {model: path}.")
        return None
    return read_section(ReferenceSection, node.entries, problems, inside="reference")


def _procedure(entries: Mapping[str, Node], source: str, problems: Problems) -> dict[str, Any]:
    """The block as plain values; the plan of that name checks them, since it alone knows what it reads.

    What is null is not there, so that a command line can take out what a recipe has.
    """
    node = entries.get("procedure")
    if node is None or is_null(node):
        return {}
    if not isinstance(node, Block):
        problems.add(node.place, "procedure", "expected a block. Write procedure: {name: ...}.")
        return {}
    if "start" in node.entries:
        _check_start(node.entries["start"], source, problems)
    values: dict[str, Any] = read_value("procedure", node, dict[str, Any], problems) or {}
    return {name: value for name, value in values.items() if value is not None}


def _check_start(node: Node, source: str, problems: Problems) -> None:
    """The settings of a supervised start are those of a recipe: read here, their mistakes are named with their line."""
    if is_null(node):
        return
    if not isinstance(node, Block):
        problems.add(node.place, "procedure.start", "expected a block of settings. Write start: {learning_rate: 2e-5}.")
        return
    for name in ("output_dir", "procedure"):
        if name in node.entries:
            reason = "the start has a folder of its own and no stages before it. Remove this line."
            problems.add(node.entries[name].place, f"procedure.start.{name}", reason)
    read(node, source, problems)


def _unknown(name: str, node: Node, entries: Mapping[str, Node]) -> str:
    """Why a name is not read, and what was meant: a name from elsewhere, a knob, or a misspelling."""
    if name == "loss_type":
        return loss_type_remedy(_first_text(node), names())
    value = node.text if isinstance(node, Text) else None
    reason = remedy(name, value) or misplaced_knob(name, value, node.place, entries)
    if reason:
        return reason
    if "." in name:
        block, _, inner = name.partition(".")
        return f"dotted names are for the command line. Write a block: {block}: {{{inner}: {value or '...'}}}."
    plain = name.replace("-", "_")
    hint = nearest(plain, known_names()) or nearest(plain, knob_names()).replace("`", "`loss.", 1)
    return f"there is no such setting.{hint}"


def _first_text(node: Node) -> str:
    first = node.items[0] if isinstance(node, Items) and node.items else node
    return first.text if isinstance(first, Text) else ""
