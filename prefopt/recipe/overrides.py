"""Options of the command line, laid over the tree of a recipe: `--loss.beta 0.2`, `--bf16`, `--data_files [a, b]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt.recipe.problems import Place, Problems
from prefopt.recipe.tree import Block, Items, Node, is_null, parse_value


@dataclass(frozen=True)
class Override:
    """One option: a dotted name and the value written for it."""

    name: str
    value: str


def split_options(arguments: Sequence[str], problems: Problems) -> list[Override]:
    """Arguments -> options. `--name=value` and `--name value` are the same; `--name` alone means true."""
    found: dict[str, Override] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument == "--":
            problems.add(Place(argument), argument, "is not an option. Write --name=value.")
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        if name in found:
            problems.add(Place(f"--{name}"), name, "given twice. Keep one.")
        found.setdefault(name, Override(name, value))
    return list(found.values())


def apply(tree: Block, options: Sequence[Override], problems: Problems) -> Block:
    """The tree with every option written over it, in order."""
    for option in options:
        place = Place(f"--{option.name}")
        value = parse_value(option.value, place, option.name, problems)
        if value is not None:
            tree = _Pen(option.name, value, problems).over_block(tree, option.name.split("."))
    return tree


@dataclass(frozen=True)
class _Pen:
    """Writes one value into a tree; blocks on the way are made when missing."""

    name: str
    value: Node
    problems: Problems

    def over(self, node: Node | None, path: list[str]) -> Node:
        """`node` with the value at `path` below it."""
        if not path:
            return self.value
        if node is None or is_null(node):
            node = Block({}, self.value.place)
        if isinstance(node, Block):
            return self.over_block(node, path)
        if isinstance(node, Items):
            return self._over_items(node, path)
        self.problems.add(self.value.place, self.name, f"`{node.text}` has no `{path[0]}` below it.")
        return node

    def over_block(self, block: Block, path: list[str]) -> Block:
        """The block with the value at `path` below it."""
        step, *rest = path
        return replace(block, entries={**block.entries, step: self.over(block.entries.get(step), rest)})

    def _over_items(self, node: Items, path: list[str]) -> Items:
        step, *rest = path
        items = list(node.items)
        if step.isdecimal() and int(step) < len(items):
            items[int(step)] = self.over(items[int(step)], rest)
        else:
            reason = f"this is a list: write a number from 0 to {len(items) - 1}, not `{step}`."
            self.problems.add(self.value.place, self.name, reason)
        return replace(node, items=tuple(items))
