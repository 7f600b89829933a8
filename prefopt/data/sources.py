"""Loading: every row of a source is read once, bad ones are refused (or skipped and counted), and a report says so.

Nothing here needs a model or a tokenizer, so bad data is refused before either is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from prefopt.data.columns import check_columns, check_row_columns, marker_pattern, notes_of
from prefopt.data.formats import Example, RowParser, unpair
from prefopt.data.opening import open_source
from prefopt.data.problems import BadRow, DataReport, Flaw, Problem, RawRow, Rows, SourceCount
from prefopt.data.spec import DataSpec
from prefopt.data.supervised import as_prompt, as_supervised
from prefopt.data.turns import SEGMENTS, check_turns
from prefopt.errors import DataError, RecipeError, nearest

PROGRESS_FROM = 20_000
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class LoadedExamples:
    """Examples in the order of their sources, and what was seen on the way."""

    examples: list[Example]
    report: DataReport


@dataclass(frozen=True)
class LoadRules:
    """What the reader of the examples asks of them.

    `on_bad_row`: "error" stops at the first bad row, "skip" leaves bad rows out and counts them, up to `max_bad_rows`.
    `paired`: True asks for pairs, False for labelled answers (pairs become two of them each), None takes what is there.
    `unlabelled`: a single answer without a label is a good one, and may be written in any of the ways `as_supervised`
    reads. `supervised`: besides, of pairs the chosen answer is taken, and what is labelled undesirable is left out and
    counted. `prompts_only`: every row is a prompt with
    a stand-in for its answer, whatever else it holds. The columns are those that the loss declares, or what else they
    are `needed_by`. `unequal_segments`: the two sides of a pair may count different numbers of assistant turns.
    `special_tokens` found inside the texts are counted in the report.
    """

    on_bad_row: OnBadRow = "error"
    max_bad_rows: int | None = None
    paired: bool | None = None
    unlabelled: bool = False
    supervised: bool = False
    prompts_only: bool = False
    required_columns: Sequence[str] = ()
    optional_columns: Sequence[str] = ()
    needed_by: str = "loss"
    unequal_segments: bool = False
    special_tokens: Iterable[str] = ()

    def __post_init__(self) -> None:
        known = get_args(OnBadRow)
        if self.on_bad_row not in known:
            hint = nearest(self.on_bad_row, known)
            raise RecipeError(f"on_bad_row is `{self.on_bad_row}`; write `error` or `skip`.{hint}")
        if self.max_bad_rows is not None and self.on_bad_row == "error":
            raise RecipeError("max_bad_rows has no effect while on_bad_row is `error`; write on_bad_row: skip")


def load_examples(spec: DataSpec, **rules: Any) -> LoadedExamples:
    """All examples of one split, checked; keyword arguments are the fields of `LoadRules`.

    Raises `DataError` for a missing or unreadable source, for the first bad row (or one more than `max_bad_rows`), for
    a source that mixes text and conversations or pairs and single answers, and when no example is left.
    """
    loader = _Loader(LoadRules(**rules))
    examples = [example for entry in spec.mixture or (spec,) for example in loader.load(entry)]
    loader.check_whole(examples)
    return LoadedExamples(examples, loader.report)


def load_train_test(spec: DataSpec, **rules: Any) -> tuple[LoadedExamples, LoadedExamples | None]:
    """Training examples and test examples: a part set aside by `test_split_size`, or `test_split` (of a mixture, also
    that of an entry alone), or None.

    Both parts of a set that is divided here share one report, of the whole set.
    """
    loaded = load_examples(spec, **rules)
    if spec.test_split_size is not None:
        train, test = split_by_prompt(loaded.examples, spec.test_split_size, spec.seed)
        loaded.report.held_out = len(test)
        return LoadedExamples(train, loaded.report), LoadedExamples(test, loaded.report)
    entries = [replace(entry, split=named) for entry in spec.mixture if (named := entry.test_split or spec.test_split)]
    if spec.test_split is None and not entries:
        return loaded, None
    return loaded, load_examples(replace(spec, split=spec.test_split or spec.split, mixture=entries), **rules)


def split_by_prompt(
    examples: Sequence[Example], size: float | int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """`(train, test)`, both in the given order; examples with equal prompts stay on one side.

    `size` is a share, or a number of examples (reached or, by the last prompt's other examples, just passed). Whether a
    prompt is drawn depends on its own text and the seed, so new rows move few old ones across.
    """
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(json.dumps(example.prompt, sort_keys=True, default=str), []).append(index)
    wanted = size if isinstance(size, int) else max(1, round(size * len(examples)))
    drawn: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: _draw(seed, prompt)):
        if len(drawn) >= wanted:
            break
        drawn.update(groups[prompt])
    if len(drawn) == len(examples):
        raise DataError(
            f"test_split_size {size} takes all {len(examples)} examples ({len(groups)} prompts) and leaves none to "
            "train on. Make it smaller."
        )
    train = [example for index, example in enumerate(examples) if index not in drawn]
    return train, [example for index, example in enumerate(examples) if index in drawn]


class _Loader:
    """Loads entries one after another into one report."""

    def __init__(self, rules: LoadRules) -> None:
        self.rules = rules
        self.report = DataReport()
        self._markers = marker_pattern(rules.special_tokens)
        self._paired = rules.paired
        self._seen: set[str] = set()

    def load(self, entry: DataSpec) -> list[Example]:
        """The examples of one source, after its `fraction`."""
        count = SourceCount(entry.title)
        self.report.sources.append(count)
        examples = [
            example for name, rows in open_source(entry) for example in self._read(_with_progress(rows, name), count)
        ]
        if entry.fraction is not None:
            examples = _sample(examples, entry.fraction, entry.seed)
        for example in examples:
            self._note(example)
        shaped = [part for example in examples for part in self._shape(example)]
        count.examples = len(shaped)
        return shaped

    def check_whole(self, examples: Sequence[Example]) -> None:
        """Refuse an empty result, and optional columns that only some examples have."""
        if not examples:
            seen = "\n".join(["no row can be used:", *self.report.lines()])
            raise DataError(f"{seen}\nCheck that the sources hold rows, and look at the first bad one.")
        problems = check_columns(examples, (), self.rules.optional_columns)
        if problems:
            raise DataError(f"{problems[0]} An optional column stands in every row or in none.")

    def _read(self, rows: Rows, count: SourceCount) -> Iterator[Example]:
        parser = RowParser()
        for row in rows:
            count.rows += 1
            if isinstance(row, Problem):
                self._refuse(row, count)
                continue
            try:
                example = parser.parse(self._written(row))
                self._check_columns(example)
            except BadRow as bad:
                self._refuse(bad.problem, count)
            else:
                yield example

    def _written(self, row: RawRow) -> RawRow:
        if self.rules.prompts_only:
            return as_prompt(row)
        return as_supervised(row) if self.rules.supervised or self.rules.unlabelled else row

    def _check_columns(self, example: Example) -> None:
        try:
            rules = self.rules
            check_row_columns(example, rules.required_columns, rules.optional_columns, needed_by=rules.needed_by)
            if SEGMENTS in (*self.rules.required_columns, *self.rules.optional_columns) and example.paired:
                check_turns(example, unequal=self.rules.unequal_segments)
        except Flaw as flaw:
            raise BadRow(flaw.at(example.where)) from None

    def _refuse(self, problem: Problem, count: SourceCount) -> None:
        if self.rules.on_bad_row == "error":
            raise BadRow(problem)
        self.report.add_problem(problem)
        count.bad_rows += 1
        limit = self.rules.max_bad_rows
        if limit is not None and self.report.bad_rows > limit:
            seen = "\n".join(self.report.lines())
            raise DataError(f"more than {limit} bad rows (max_bad_rows); the last: {problem}\n{seen}")

    def _note(self, example: Example) -> None:
        for note in notes_of(example, self._markers):
            self.report.add_note(note, example.where)
        if example.example_id in self._seen:
            self.report.add_note("duplicate_rows", example.where)
        self._seen.add(example.example_id)

    def _shape(self, example: Example) -> tuple[Example, ...]:
        """The example as pairs or single answers, whichever is asked for; without a wish, all like the first."""
        if self.rules.supervised:
            return self._good_answer(example)
        if self._paired is None:
            self._paired = example.paired
        if self._paired is False and example.paired and self.rules.paired is False:
            self.report.add_note("pairs_taken_apart", example.where)
            return unpair(example)
        if example.paired is not self._paired:
            names = {True: "a pair (chosen, rejected)", False: "a labelled answer (completion, label)"}
            readers = "" if example.paired else ", such as kto or sft"
            raise DataError(
                f"{example.where}: the row is {names[example.paired]}, but {names[self._paired]} is needed here. "
                f"Choose a loss that reads such rows{readers}, or other data."
            )
        return (example,)

    def _good_answer(self, example: Example) -> tuple[Example, ...]:
        answer = unpair(example)[0] if example.paired else example
        if not answer.desirable:
            self.report.add_note("undesirable_left_out", example.where)
            return ()
        return (answer,)


def _draw(seed: int, key: object) -> bytes:
    """A number that depends on the seed and the key alone, the same on every machine and Python version."""
    return hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()


def _sample(examples: list[Example], fraction: float, seed: int) -> list[Example]:
    count = max(1, round(fraction * len(examples)))
    drawn = sorted(range(len(examples)), key=lambda index: _draw(seed, index))[:count]
    return [examples[index] for index in sorted(drawn)]


def _with_progress(rows: Rows, name: str) -> Rows:
    """The rows, with a progress bar on a terminal once there are many."""
    yield from islice(rows, PROGRESS_FROM)
    from tqdm.auto import tqdm

    with tqdm(rows, desc=name, initial=PROGRESS_FROM, unit=" rows", disable=None) as bar:
        yield from bar
