"""Recipe text -> a tree of blocks, lists and texts that remember where they were written. Nothing is converted here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import yaml

from prefopt.errors import RecipeError
from prefopt.recipe.problems import TOKEN, Place, Problems, redact

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
NULLS = ("", "~", "null", "Null", "NULL")
TAG = "tag:yaml.org,2002:"
KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "value")
PLAIN_TAGS = tuple(TAG + kind for kind in KINDS)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Text:
    """A single value as written. `quoted` tells `"yes"`, which is text, from `yes`, which may be more."""

    text: str
    quoted: bool
    place: Place


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Text | Items | Block, ...]
    place: Place


@dataclass(frozen=True)
class Block:
    """Names and values, in the order written."""

    entries: dict[str, Text | Items | Block]
    place: Place


Node: TypeAlias = Text | Items | Block
At: TypeAlias = Callable[[int], Place]


def is_null(node: Node) -> bool:
    """Whether a value is written as null, which takes out what was there."""
    return isinstance(node, Text) and not node.quoted and node.text in (*NULLS, "None")


def parse(text: str, source: str, problems: Problems, *, numbered: bool = True) -> Block:
    """The tree of a whole recipe. `source` is the file name that messages start with, with a line when `numbered`.

    Duplicate keys, foreign tags and texts that look like access tokens are reported and left out.
    Raises `RecipeError` when the text is not YAML or not a block of names and values.
    """
    at: At = (lambda line: Place(source, line)) if numbered else (lambda line: Place(source))
    root = _compose(text, at)
    if root is None:
        raise RecipeError(f"{source}: the recipe is empty. Write at least a model, data and a loss.")
    tree = _Builder(at, problems).build(root, at(1), "")
    if not isinstance(tree, Block):
        problems.refuse()
        raise RecipeError(f"{at(1)}: a recipe is made of `name: value` lines.")
    return tree


def parse_value(text: str, place: Place, name: str, problems: Problems) -> Node | None:
    """One value from the command line. Lists, blocks and quoted texts are YAML; all else is text as it stands."""
    if text[:1] not in ("[", "{", '"', "'"):
        tree: Node | None = Text(text, False, place)
        return tree if _allowed(text, place, name, problems) else None
    root = _compose(text, lambda line: place)
    return None if root is None else _Builder(lambda line: place, problems).build(root, place, name)


def walk(node: Node) -> Iterator[Node]:
    """`node` and everything below it."""
    yield node
    for child in node.entries.values() if isinstance(node, Block) else node.items if isinstance(node, Items) else ():
        yield from walk(child)


def _compose(text: str, at: At) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{at(1)}: longer than {MAX_BYTES} characters; this is not a recipe.")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{at(line)}: character {error.character!r} is not allowed here. Remove it.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = redact(str(error.problem or error.context))
        raise RecipeError(f"{at(line)}: not valid YAML: {reason}. Check indentation and quotes.") from None
    except RecursionError:
        raise RecipeError(f"{at(1)}: nested too deeply to be a recipe.") from None
    return node


def _allowed(text: str, place: Place, name: str, problems: Problems) -> bool:
    control = CONTROL.search(text)
    if TOKEN.search(text):
        remedy = "Remove it, and set HF_TOKEN or run `hf auth login`."
        problems.add(place, name, f"this looks like an access token. {remedy}")
    elif control:
        problems.add(place, name, f"holds the control character {control[0]!r}. Remove it.")
    return not control and not TOKEN.search(text)


class _Builder:
    """Turns composed YAML nodes into our tree; counts them, since aliases can multiply without end."""

    def __init__(self, at: At, problems: Problems) -> None:
        self._at = at
        self._problems = problems
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: yaml.Node, place: Place, name: str) -> Node | None:
        """The tree below `node`, or None when it was refused. `place` is where its key stands."""
        self._count += 1
        if self._count > MAX_NODES or id(node) in self._open:
            raise RecipeError(f"{place}: aliases repeat without end. Write the values out.")
        if node.tag not in PLAIN_TAGS:
            self._problems.add(place, name, f"the tag `{node.tag}` is not read here. Write a plain value.")
            return None
        if isinstance(node, yaml.ScalarNode):
            allowed = _allowed(node.value, place, name, self._problems)
            return Text(node.value, node.style is not None, place) if allowed else None
        self._open.add(id(node))
        inside = self._items if isinstance(node, yaml.SequenceNode) else self._block
        built = inside(node, place, name)
        self._open.discard(id(node))
        return built

    def _items(self, node: yaml.Node, place: Place, name: str) -> Items:
        built = (
            self.build(item, self._line(item), f"{name}.{index}" if name else str(index))
            for index, item in enumerate(node.value)
        )
        return Items(tuple(item for item in built if item is not None), place)

    def _block(self, node: yaml.Node, place: Place, name: str) -> Block:
        entries: dict[str, Node] = {}
        first: dict[str, Place] = {}
        for key, value in node.value:
            here = self._line(key)
            if not isinstance(key, yaml.ScalarNode):
                self._problems.add(here, name, "a name must be plain text.")
                continue
            path = f"{name}.{key.value}" if name else key.value
            if key.value in first:
                self._problems.add(here, path, f"written twice, first on line {first[key.value].line}. Keep one.")
                continue
            first[key.value] = here
            if not self._readable(key, here, path):
                continue
            built = self.build(value, here, path)
            if built is not None:
                entries[key.value] = built
        return Block(entries, place)

    def _readable(self, key: yaml.ScalarNode, place: Place, path: str) -> bool:
        if key.value == "<<":
            self._problems.add(place, path, "merge keys are not read here. Write the lines out.")
            return False
        return _allowed(key.value, place, path, self._problems)

    def _line(self, node: yaml.Node) -> Place:
        return self._at(node.start_mark.line + 1)
