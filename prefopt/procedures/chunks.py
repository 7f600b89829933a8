"""Preference data cut into chunks: by the data sets it comes from, by a column, or by number of rows."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.formats import Example
from prefopt.data.problems import DataReport
from prefopt.data.sources import load_examples, split_by_prompt
from prefopt.data.spec import DataSpec
from prefopt.errors import DataError, RecipeError, nearest
from prefopt.procedures.easiness import Gap, easiness
from prefopt.report.results import plain

if TYPE_CHECKING:
    from prefopt.recipe import Recipe
    from prefopt.recipe.sections import DataSection

EASY, GIVEN, RANDOM = "easy_to_hard", "given", "random"
ORDERS = (EASY, GIVEN, RANDOM)
TEST, REPORT = "test.jsonl", "chunks.json"
_FORMS = "Write `datasets`, a number of equal parts, {sizes: [1000, 3000]}, or {column: source, values: [easy, hard]}."


@dataclass(frozen=True)
class Cut:
    """How rows become chunks: `by` is `datasets`, `column` or `rows`.

    `names` are the data sets or values in their given order. Rows are cut into `sizes`, or where there are none into
    `count` parts that differ by one row at most.
    """

    by: str
    count: int
    names: tuple[str, ...] = ()
    column: str = ""
    sizes: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """What it does, in a few words."""
        if self.by == "datasets":
            return f"one chunk for each of {self.count} data sets"
        if self.by == "column":
            return f"one chunk for each value of `{self.column}`: {', '.join(self.names)}"
        return f"chunks of {', '.join(map(str, self.sizes))} rows" if self.sizes else f"{self.count} equal chunks"


@dataclass(frozen=True)
class Rows:
    """Training examples with the number of the data set each comes from, test examples, and how they were read."""

    train: list[Example]
    sources: list[int]
    test: list[Example] | None
    report: DataReport


@dataclass(frozen=True)
class Chunk:
    """The rows of one step, in the order of the data."""

    name: str
    examples: list[Example]


def chunk_file(step: int) -> str:
    """The file of the chunk that a step trains on; steps count from 1."""
    return f"chunk-{step}.jsonl"


def read_cut(given: Any, data: DataSection) -> Cut:
    """The `chunks` of a `procedure` block, and the data they are cut from. Raises `RecipeError`."""
    if given == "datasets":
        names = _names(_entries(data.spec(evaluate=False)))
        if not names:
            raise RecipeError(f"procedure.chunks: the recipe has no list of `datasets` or `data_files`. {_FORMS}")
        return Cut("datasets", len(names), names)
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return Cut("rows", given)
    if isinstance(given, Mapping) and given.keys() == {"sizes"}:
        return _by_sizes(given["sizes"])
    if isinstance(given, Mapping) and "column" in given:
        return _by_column(given)
    raise RecipeError(f"procedure.chunks: {'missing' if given is None else f'{given!r} is not known'}. {_FORMS}")


def load_rows(recipe: Recipe, cut: Cut) -> Rows:
    """The pairs of a recipe, as training reads them. Raises `DataError` as training does."""
    spec, rules = recipe.data_spec(), _rules(recipe)
    entries = _entries(spec) if cut.by == "datasets" else ()
    whole = replace(spec, mixture=entries, data_files=None, column_names={}) if entries else spec
    loaded = load_examples(whole, **rules)
    counts = [source.examples for source in loaded.report.sources]
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    test = None
    train = loaded.examples
    if spec.test_split_size is not None:
        train, test = split_by_prompt(train, spec.test_split_size, spec.seed)
    elif spec.mixture and (parts := [entry for entry in spec.mixture if entry.test_split]):
        tests = [replace(entry, split=str(entry.test_split)) for entry in parts]
        test = load_examples(replace(spec, mixture=tests), **rules).examples
    elif spec.test_split is not None:
        test = load_examples(replace(spec, split=spec.test_split), **rules).examples
    number_of = {id(example): number for example, number in zip(loaded.examples, numbers, strict=True)}
    return Rows(train, [number_of[id(example)] for example in train], test, loaded.report)


def order_chunks(
    cut: Cut, rows: Rows, order: str, *, gaps: Mapping[str, Gap] | None = None, length: str = "sum", seed: int = 0
) -> list[Chunk]:
    """The chunks in the order of the steps; each keeps the order of the data inside.

    Chunks that have a source are ordered as wholes: `easy_to_hard` by the share of pairs that `gaps` (by example id)
    find right, ties in the given order. Chunks of rows have none, so the rows are ordered and then cut. Raises
    `DataError` when the cut does not fit the data.
    """
    if cut.by == "rows":
        return _cut_rows(cut, rows.train, order, gaps, length, seed)
    chunks = _by_source(cut, rows)
    if order == RANDOM:
        random.Random(seed).shuffle(chunks)
    if order == EASY and gaps is not None:
        chunks.sort(key=lambda chunk: -(easiness(chunk.examples, gaps, length)["accuracy"] or 0.0))
    return chunks


def write_chunks(
    folder: Path, chunks: Sequence[Chunk], test: Sequence[Example] | None, report: Mapping[str, Any]
) -> None:
    """Write a file of JSON lines for each chunk and for the test rows, with every column, and `chunks.json` last."""
    folder.mkdir(parents=True, exist_ok=True)
    for step, chunk in enumerate(chunks, start=1):
        _write(folder / chunk_file(step), chunk.examples)
    if test is not None:
        _write(folder / TEST, test)
    (folder / REPORT).write_text(json.dumps(plain(report), indent=1) + "\n", encoding="utf-8")


def _names(entries: Sequence[DataSpec]) -> tuple[str, ...]:
    """The titles of the data sets, with the split where two have the same one."""
    titles = [entry.title for entry in entries]
    return tuple(
        title if titles.count(title) == 1 else f"{title}, {entry.split}"
        for title, entry in zip(titles, entries, strict=True)
    )


def _by_sizes(given: Any) -> Cut:
    if not isinstance(given, list) or not given or not all(type(size) is int and size >= 1 for size in given):
        raise RecipeError("procedure.chunks.sizes: must be a list of whole numbers from 1 on, such as [1000, 3000].")
    return Cut("rows", len(given), sizes=tuple(given))


def _by_column(given: Mapping[str, Any]) -> Cut:
    for key in given:
        if key not in ("column", "values"):
            raise RecipeError(f"procedure.chunks.{key}: not known.{nearest(key, ('column', 'values'))}")
    values = given.get("values")
    if not isinstance(values, list) or not values:
        column = given["column"]
        raise RecipeError(f"procedure.chunks.values: missing. List the values of `{column}`: one chunk, one step each.")
    names = tuple(str(value) for value in values)
    if len(set(names)) < len(names):
        raise RecipeError("procedure.chunks.values: a value is listed twice.")
    return Cut("column", len(names), names, column=str(given["column"]))


def _entries(spec: DataSpec) -> tuple[DataSpec, ...]:
    """The data sets of a mixture, or each file of a list."""
    if spec.mixture or spec.path is not None:
        return tuple(spec.mixture)
    files = spec.data_files["train"] if isinstance(spec.data_files, Mapping) else spec.data_files
    if files is None or isinstance(files, str):
        return ()
    return tuple(DataSpec(data_files=file, column_names=spec.column_names) for file in files)


def _rules(recipe: Recipe) -> dict[str, Any]:
    args, objective = recipe.training_arguments(), recipe.objective()
    return {
        "on_bad_row": args.on_bad_row,
        "max_bad_rows": args.max_bad_rows,
        "paired": True,
        "required_columns": objective.columns,
    }


def _by_source(cut: Cut, rows: Rows) -> list[Chunk]:
    chunks = [Chunk(name, []) for name in cut.names]
    places = {name: number for number, name in enumerate(cut.names)}
    for example, source in zip(rows.train, rows.sources, strict=True):
        chunks[source if cut.by == "datasets" else _place(example, cut, places)].examples.append(example)
    for chunk in chunks:
        if not chunk.examples:
            raise DataError(f"procedure.chunks: no training row belongs to `{chunk.name}`. Leave it out.")
    return chunks


def _place(example: Example, cut: Cut, places: Mapping[str, int]) -> int:
    if cut.column not in example.columns:
        hint = nearest(cut.column, example.columns)
        raise DataError(f"{example.where}: procedure.chunks: the row has no column `{cut.column}`.{hint}")
    value = str(example.columns[cut.column])
    if value not in places:
        raise DataError(
            f"{example.where}: column `{cut.column}` is `{value}`, which procedure.chunks.values does not list. "
            "Every row belongs to one chunk: list it, or leave such rows out of the data."
        )
    return places[value]


def _cut_rows(
    cut: Cut, examples: Sequence[Example], order: str, gaps: Mapping[str, Gap] | None, length: str, seed: int
) -> list[Chunk]:
    ranked = list(range(len(examples)))
    if order == RANDOM:
        random.Random(seed).shuffle(ranked)
    if order == EASY and gaps is not None:
        # Rows without a gap are too long and will be dropped, wherever they are.
        known = [gaps.get(example.example_id) for example in examples]
        ranked.sort(key=lambda index: -(gap.of(length) if (gap := known[index]) else 0.0))
    sizes = cut.sizes or _equal(len(examples), cut.count)
    if sum(sizes) != len(examples) or not min(sizes):
        raise DataError(
            f"procedure.chunks: sizes of {', '.join(map(str, sizes))} do not divide the {len(examples)} training rows. "
            "Each row belongs to one chunk, and none is empty: change the sizes."
        )
    bounds = pairwise([0, *accumulate(sizes)])
    return [
        Chunk(f"rows {step}", [examples[index] for index in sorted(ranked[start:end])])
        for step, (start, end) in enumerate(bounds, start=1)
    ]


def _equal(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def _write(path: Path, examples: Sequence[Example]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(_row(example))) + "\n" for example in examples)


def _row(example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}
    if example.tools is not None:
        row["tools"] = example.tools
    if example.chat_template_kwargs:
        row["chat_template_kwargs"] = example.chat_template_kwargs
    if example.unfinished:
        row["unfinished"] = list(example.unfinished)
    return {**row, **example.columns}
