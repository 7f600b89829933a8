"""From what a user passes as data to the `TokenDataset` a trainer reads, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from prefopt.data.answers import TARGET
from prefopt.data.collation import Collator
from prefopt.data.columns import refuse_rows
from prefopt.data.dataset import TokenDataset
from prefopt.data.formats import Example
from prefopt.data.mismatch import has_mismatched, single_answers, with_mismatched
from prefopt.data.problems import DataReport
from prefopt.data.sources import load_examples, load_train_test
from prefopt.data.spec import DataSpec
from prefopt.data.targets import with_targets
from prefopt.data.tokenization import OpenCache, TokenSettings, no_cache, tokenize_examples
from prefopt.data.turns import SEGMENTS
from prefopt.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.config import PreferenceConfig


class Needs(Protocol):
    """What an objective declares about its rows."""

    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    paired_required: bool
    all_completions: bool
    mismatched: bool
    turns: bool

    def row_problem(self, columns: Mapping[str, float]) -> str:
        """Why a row with these columns cannot be trained on; empty when it can."""


# A row's weight multiplies its loss, whatever the loss is.
WEIGHT = "weight"


@dataclass(frozen=True)
class Preparation:
    """How raw rows become token rows: the tokenizer, the settings of a run, and what its losses declare.

    `paired`: True when a loss compares two answers, None when any kind of row will do. `unlabelled`: no loss reads bad
    answers, so a good one needs no label. `supervised`: rows become single good answers. `mismatched`: rows become
    single answers, each with a mismatched one. `turns`: some loss reads the assistant's turns. `row_problem`: what a
    loss objects to in a row's columns. `say` receives the lines of the reports. `open_cache` gives the place where
    token ids are kept from one run to the next, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    args: PreferenceConfig
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    paired: bool | None = None
    unlabelled: bool = False
    supervised: bool = False
    mismatched: bool = False
    turns: bool = False
    row_problem: Callable[[Mapping[str, float]], str] = lambda columns: ""
    say: Callable[..., None] = print
    open_cache: OpenCache = no_cache

    @classmethod
    def for_objective(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        args: PreferenceConfig,
        needs: Needs,
        say: Callable[..., None] = print,
        open_cache: OpenCache = no_cache,
    ) -> Preparation:
        """What the rows of a run with this objective must be."""
        paired = True if needs.paired_required else None
        return cls(
            tokenizer,
            args,
            columns=needs.columns,
            optional_columns=needs.optional_columns,
            paired=paired,
            unlabelled=not needs.all_completions,
            mismatched=needs.mismatched,
            turns=needs.turns,
            row_problem=needs.row_problem,
            say=say,
            open_cache=open_cache,
        )

    def train_and_test(self, spec: DataSpec) -> tuple[TokenDataset, TokenDataset | None]:
        """Training rows and, where the source has some or sets some aside, test rows; with the targets it names."""
        if spec.targets is not None and TARGET not in (*self.columns, *self.optional_columns):
            raise RecipeError("targets: no loss of this run reads a target. Remove them, or use one that does: slic")
        train, test = load_train_test(spec, **self._rules())
        rows = self.tokens(train.examples, train.report, "train")
        held_out = None if test is None else self.tokens(test.examples, test.report, "test")
        if spec.targets is None:
            return rows, held_out
        targets = self._targets(spec.targets)
        return self.with_targets(rows, targets), None if held_out is None else self.with_targets(held_out, targets)

    def with_targets(self, data: TokenDataset, targets: TokenDataset) -> TokenDataset:
        """Pairs with a target beside each; see `prefopt.data.targets`."""
        self.say(f"targets: {len(targets):,} for {len(data):,} pairs, each with a prompt of its own")
        return with_targets(data, targets, self._seed)

    def _targets(self, spec: DataSpec) -> TokenDataset:
        """The second stream: answers alone, of which no loss declares a column."""
        alone = replace(
            self,
            columns=(),
            optional_columns=(),
            paired=None,
            supervised=True,
            turns=False,
            row_problem=lambda columns: "",
        )
        loaded = load_examples(spec, **alone._rules())
        return alone.tokens(loaded.examples, loaded.report, "targets")

    def one(self, rows: Any, title: str) -> TokenDataset:
        """A data set, list of rows or `TokenDataset` as a `TokenDataset`."""
        if isinstance(rows, TokenDataset):
            return self._matched(rows, title)
        loaded = load_examples(DataSpec(rows=rows, rows_name=title), **self._rules())
        return self.tokens(loaded.examples, loaded.report, title)

    def train(self, rows: Any) -> TokenDataset | None:
        """Training rows as `one`; of a dict of splits its `train`."""
        return None if rows is None else self.one(rows, "train")

    def any(self, rows: Any, title: str) -> Any:
        """As `one`, also for None and for a dict of data sets by name."""
        if rows is None:
            return None
        if isinstance(rows, Mapping):
            return {name: self.one(part, name) for name, part in rows.items()}
        return self.one(rows, title)

    def collator(self, data: TokenDataset | Mapping[str, TokenDataset] | None, needs: Needs) -> Collator:
        """The collator for rows such as those of `data`."""
        sample = next(iter(data.values())) if isinstance(data, Mapping) else data
        if sample is None:
            raise DataError("there are no rows: give train_dataset, or eval_dataset to evaluate alone")
        return Collator(
            pad_token_id=self.tokenizer.pad_token_id,
            paired=sample.paired,
            all_completions=needs.all_completions,
            mismatched=self.mismatched,
            turns=self.turns,
            columns=tuple(name for name in sample.columns if name not in (TARGET, SEGMENTS)),
            targets=TARGET in sample.columns and TARGET in (*needs.columns, *needs.optional_columns),
            pad_to_multiple_of=self.args.pad_to_multiple_of or 1,
        )

    def tokens(self, examples: Sequence[Example], report: DataReport, title: str) -> TokenDataset:
        """Examples as token rows; `report` is of how they were loaded."""
        args = self.args
        settings = TokenSettings(
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            cut_answers=args.cut_answers,
            min_prompt_tokens=args.min_prompt_tokens,
            max_dropped=args.max_dropped,
            prompt_boundary=args.prompt_boundary,
            identical_pairs=args.identical_pairs,
            chat_template_kwargs=args.chat_template_kwargs or {},
        )
        optional = (*self.optional_columns, WEIGHT)
        refuse_rows(examples, (*self.columns, *optional), self.row_problem)
        tokens = tokenize_examples(
            examples,
            self.tokenizer,
            settings,
            self.columns,
            optional,
            processes=args.dataset_num_proc,
            open_cache=self.open_cache,
            turns=self.turns,
        )
        self.say(*(f"{title}: {line}" for line in (*report.lines(), *tokens.report.lines())))
        _number(tokens.rows)
        data = TokenDataset(tokens.rows, {"data": report.as_dict(), "tokens": tokens.report.as_dict()})
        return self._matched(data, title)

    def _rules(self) -> dict[str, Any]:
        return {
            "on_bad_row": self.args.on_bad_row,
            "max_bad_rows": self.args.max_bad_rows,
            "paired": self.paired,
            "unlabelled": self.unlabelled,
            "supervised": self.supervised,
            "required_columns": self.columns,
            "optional_columns": (*self.optional_columns, WEIGHT),
            "unequal_segments": self.args.allow_unequal_segments,
            "special_tokens": self.tokenizer.all_special_tokens,
        }

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _matched(self, data: TokenDataset, title: str) -> TokenDataset:
        """With mismatched answers where a loss asks for them; rows that have theirs stay as they are."""
        if not self.mismatched or has_mismatched(data):
            return data
        if data.paired:
            self.say(f"{title}: {len(data):,} pairs are read as {2 * len(data):,} single answers")
        matched, left = with_mismatched(single_answers(data), self._seed, self.args.max_length)
        if left:
            self.say(f"{title}: {left:,} answers have no other prompt to stand behind and keep their own")
        return matched


def _number(rows: Sequence[dict[str, Any]]) -> None:
    """Where rows of several sources share their numbers, count them through, so that each has its own."""
    if len({row["row"] for row in rows}) < len(rows):
        for index, row in enumerate(rows):
            row["row"] = index
