"""The `loss:` block of a recipe: registered names, and for each loss only the knobs it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.errors import RecipeError
from prefopt.losses import Loss, get, make, names
from prefopt.losses.knobs import knobs_of
from prefopt.recipe.fields import read_value
from prefopt.recipe.problems import Place, Problems
from prefopt.recipe.sections import LossSpec
from prefopt.recipe.tree import Block, Items, Node, Text, is_null


def read_losses(entries: Mapping[str, Node], problems: Problems) -> list[LossSpec]:
    """The losses of the `loss:` block or list, each with the knobs that were written."""
    node = entries.get("loss")
    if isinstance(node, Text) and not is_null(node):
        written = f" Write loss: {{name: {node.text}}}." if node.text in names() else ""
        problems.add(node.place, "loss", f"expected a block with `name` and knobs, or a list of such blocks.{written}")
    if isinstance(node, Items) and not node.items:
        problems.add(node.place, "loss", "the list is empty. Write at least one loss.")
    found = [_loss(block, path, problems) for path, block in _loss_blocks(node)]
    return [loss for loss in found if loss]


def _loss_blocks(node: Node | None) -> list[tuple[str, Node]]:
    if isinstance(node, Items):
        return [(f"loss.{index}", item) for index, item in enumerate(node.items)]
    return [("loss", node)] if isinstance(node, Block) else []


def _loss(node: Node, path: str, problems: Problems) -> LossSpec | None:
    """One loss block: the name must be registered, and the loss must read every knob."""
    if not isinstance(node, Block):
        problems.add(node.place, path, "expected a block with `name` and knobs.")
        return None
    name = node.entries.get("name")
    if not isinstance(name, Text):
        problems.add(node.place, path, f"`name` is missing. Write one of {', '.join(names())}.")
        return None
    try:
        loss = get(name.text)
    except RecipeError as error:
        problems.add(name.place, f"{path}.name", _reason(error))
        return None
    before = len(problems)
    knobs = {key: _knob(loss, key, value, path, problems) for key, value in node.entries.items() if key != "name"}
    if len(problems) == before:
        _check_together(loss.name, knobs, node, path, problems)
    return LossSpec(loss.name, knobs)


def _knob(loss: type[Loss], key: str, node: Node, path: str, problems: Problems) -> Any:
    knob = next((knob for knob in knobs_of(loss) if knob.name == key), None)
    if knob is None:
        problems.add(node.place, f"{path}.{key}", _not_a_knob(loss.name, key))
        return None
    before = len(problems)
    value = read_value(f"{path}.{key}", node, knob.type | None if knob.optional else knob.type, problems)
    if len(problems) > before:
        return None
    try:
        return knob.checked(value, loss.name)
    except RecipeError as error:
        problems.add(node.place, f"{path}.{key}", _reason(error))
        return None


def _not_a_knob(loss: str, key: str) -> str:
    if key in ("weight", "loss_weight"):
        return "weights stand beside the list of losses. Write loss_weights: [...]."
    try:
        make(loss, **{key: None})
    except RecipeError as error:
        return _reason(error)
    raise AssertionError(f"{loss} reads {key} after all")


def _check_together(loss: str, knobs: Mapping[str, Any], node: Block, path: str, problems: Problems) -> None:
    try:
        make(loss, **knobs)
    except RecipeError as error:
        named = re.match(r"loss\.(\w+): ", str(error))
        key = named[1] if named else ""
        place = node.entries[key].place if key in node.entries else node.place
        problems.add(place, f"{path}.{key}" if key else path, _reason(error))


def _reason(error: RecipeError) -> str:
    """The error without the `loss.knob:` it starts with, since a problem names its own place."""
    return re.sub(r"^loss(\.\w+)?: ", "", str(error))


def misplaced_knob(name: str, value: str | None, place: Place, entries: Mapping[str, Node]) -> str | None:
    """What to write for a knob that stands outside the loss block; None when `name` is no knob of any loss."""
    readers = [loss for loss in names() if name in [knob.name for knob in knobs_of(get(loss))]]
    if not readers:
        return None
    chosen = _chosen(entries)
    path = next((path for path, loss in chosen.items() if loss in readers), None)
    if chosen and path is None:
        return f"a knob of {', '.join(readers)}; {', '.join(chosen.values())} does not read it. Remove it."
    path, shown = path or "loss", value or "..."
    if place.on_command_line:
        return f"a knob of the loss. Write --{path}.{name} {shown}."
    return f"a knob of the loss. Write {path}.{name}, that is `{name}: {shown}` under `loss:`."


def knob_names() -> list[str]:
    """Every knob of every loss."""
    return sorted({knob.name for loss in names() for knob in knobs_of(get(loss))})


def _chosen(entries: Mapping[str, Node]) -> dict[str, str]:
    """Path -> name of every block of the recipe whose loss exists."""
    found = {}
    for path, block in _loss_blocks(entries.get("loss")):
        name = block.entries.get("name") if isinstance(block, Block) else None
        if isinstance(name, Text) and name.text in names():
            found[path] = name.text
    return found
