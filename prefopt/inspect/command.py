"""`prefopt inspect`: one row of a recipe's data, on the terminal or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefopt.errors import UserError
from prefopt.inspect.page import page_of
from prefopt.inspect.rows import RowView, raw_row, token_row, view_of, with_numbers
from prefopt.inspect.scores import token_numbers
from prefopt.inspect.terminal import print_row
from prefopt.models import complete_tokenizer, load_tokenizer
from prefopt.procedures.train import open_tokenizer
from prefopt.recipe import Recipe, load_recipe
from prefopt.report.results import write_whole
from prefopt.token_cache import preparation


def inspect_row(recipe: Recipe, number: int, *, split: str = "train", model: str | None = None) -> RowView:
    """A row as a run of the recipe would read it, with the numbers of a trained `model` where one is named.

    The starting model is the recipe's, and the reference the one that the recipe names, or else the starting model.
    Raises `UserError` where the run would refuse the row, or a model cannot be opened.
    """
    section, args = recipe.model, recipe.training_arguments()
    tokenizer = complete_tokenizer(open_tokenizer(recipe) if model is None else load_tokenizer(model))
    prepared = replace(preparation(tokenizer, args, recipe.objective()), say=lambda *lines: None)
    example, row, notes = token_row(raw_row(replace(recipe.data_spec(), split=split), number), prepared)
    view = view_of(example, row, notes, tokenizer)
    if model is None:
        return view
    if section.model_name_or_path is None:
        raise UserError("--model: the recipe starts from scratch, so there is no model to compare with. Name the one "
                        "that training started from, with --model_name_or_path PATH --from_scratch null")  # fmt: skip
    options = {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code}
    start, named = (section.model_name_or_path, section.model_revision), recipe.reference.model
    reference = None if named is None else (named, recipe.reference.revision)
    numbers = token_numbers(row, tokenizer, model=model, start=start, reference=reference, **options)
    if recipe.reference.sync_steps is not None:
        began = f"log-ratios and KL are to {named or start[0]}, where the reference began: it moved in training"
        view = replace(view, notes=(*view.notes, began))
    return with_numbers(view, row, numbers)


def inspect_command(
    name: str, number: int, overrides: Sequence[str], *, split: str, model: str | None, html: Path | None
) -> None:
    """Print the row, or write it as a page where a file is named."""
    recipe = load_recipe(name, overrides)
    view = inspect_row(recipe, number, split=split, model=model)
    if html is None:
        print_row(view)
        return
    losses = " + ".join(loss.name for loss in recipe.loss)
    write_whole(html, page_of(view, f"Row {number} of {split}, as {losses} reads it"))
    print(f"written to {html}")
