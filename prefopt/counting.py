"""How many rows a recipe has and how long they are, found out without a model and without a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data import Example, load_train_test
from prefopt.data.columns import refuse_rows
from prefopt.data.prepare import WEIGHT
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import UserError
from prefopt.recipe import Recipe

SAMPLE = 2000
CHARACTERS_PER_TOKEN = 4
LENGTH_SETTINGS = ("max_length", "truncation_mode", "cut_answers", "min_prompt_tokens", "max_dropped")


@dataclass(frozen=True)
class Rows:
    """Rows of a run and their mean length, the prompt counted with every answer; None where nobody could tell."""

    note: str
    train: int | None = None
    test: int | None = None
    tokens: float | None = None

    @property
    def kept(self) -> float | None:
        """The most tokens that reference scores are kept of; None where it is not known."""
        if self.train is None or self.tokens is None:
            return None
        return (self.train + (self.test or 0)) * self.tokens


# What procedures read that sample answers of their own: the data's answers, or its prompts alone.
_ANSWERS, _PROMPTS = {"supervised": True}, {"prompts_only": True}


def _read_by_rounds(procedure: Mapping[str, Any]) -> dict[str, bool]:
    """How a procedure with rounds reads the data; empty for one without."""
    online = _ANSWERS if "environment" in procedure else _PROMPTS
    return {"spin": _ANSWERS, "online": online}.get(procedure.get("name", ""), {})


def count_rows(recipe: Recipe) -> Rows:
    """Count and measure the rows of local files. What is wrong with them becomes a note: explaining never fails."""
    data = recipe.data
    if "world" in recipe.procedure or recipe.procedure.get("name") == "small_world":
        return Rows("The first stages make them; see the sizes there.")
    if not data.local_files() and (data.dataset_name or not data.data_files):
        return Rows("Rows are not counted: the data is not on this machine.")
    objective = recipe.objective()
    settings = recipe.resolved()
    bad_rows = {"on_bad_row": settings["on_bad_row"], "max_bad_rows": settings.get("max_bad_rows")}
    try:
        if reads := _read_by_rounds(recipe.procedure):
            train, test = load_train_test(recipe.data_spec(), **bad_rows, **reads)
            note = "Every round makes pairs of them; their tokens are counted then."
            return Rows(note, len(train.examples), None if test is None else len(test.examples))
        train, test = load_train_test(
            recipe.data_spec(),
            **bad_rows,
            paired=objective.paired_required or None,
            unlabelled=not objective.all_completions,
            required_columns=objective.columns,
            optional_columns=(*objective.optional_columns, WEIGHT),
            unequal_segments=settings.get("allow_unequal_segments", False),
        )
        refuse_rows(train.examples, (*objective.columns, *objective.optional_columns), objective.row_problem)
    except UserError as error:
        return Rows(f"The data is refused: {error}")
    tokens, note = _length(recipe, settings, train.examples)
    return Rows(note, len(train.examples), None if test is None else len(test.examples), tokens)


def _length(recipe: Recipe, settings: dict[str, Any], examples: Sequence[Example]) -> tuple[float, str]:
    """Mean tokens of a row: with the tokenizer where it is on this machine, else estimated from characters."""
    sample, every_answer = examples[:SAMPLE], recipe.objective().all_completions
    estimate = sum(_characters(example, every_answer) for example in sample) / len(sample) / CHARACTERS_PER_TOKEN
    tokenizer = _local_tokenizer(recipe)
    if tokenizer is None:
        return estimate, f"Lengths are estimates, {CHARACTERS_PER_TOKEN} characters to a token: no tokenizer is here."
    try:
        lengths = TokenSettings(**{name: settings[name] for name in LENGTH_SETTINGS})
        columns = (*recipe.objective().columns, *recipe.objective().optional_columns)
        report = tokenize_examples(sample, tokenizer, lengths, optional_columns=columns).report
    except UserError as error:
        return estimate, f"The rows are refused: {error}"
    counts = report.tokens
    tokens = counts["plain"] if every_answer or "chosen" not in counts else counts["prompt"] + counts["chosen"]
    return tokens / report.kept, f"Tokenised: {report.kept} of the first {len(sample)} rows kept."


def _local_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    name = recipe.model.tokenizer_name_or_path or recipe.model.model_name_or_path
    if name is None:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    return tokenizer


def _characters(example: Example, every_answer: bool) -> int:
    answers = [example.chosen, example.rejected if every_answer else None, example.completion]
    return sum(_text_length(example.prompt) + _text_length(answer) for answer in answers if answer is not None)


def _text_length(part: Any) -> int:
    if isinstance(part, str):
        return len(part)
    return sum(len(str(message.get("content") or "")) for message in part)
