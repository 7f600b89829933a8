"""What the reference of a recipe will cost: which model, beside the policy or from a store, and how many bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from prefopt.recipe import Recipe
from prefopt.reference.choosing import FROM_EXPECTED
from prefopt.reference.forms import EXPECTED, HIDDEN, SMALL, expected_bytes
from prefopt.reference.rule import AVERAGE_WIDTH, SyncRule, sync_rule
from prefopt.reference.store import default_folder
from prefopt.reference.upkeep import size

ADAPTER_WIDTH = 4  # bytes of an adapter's weight, whatever the base is held in
_LIVE = "It is scored beside the policy at every step."


@dataclass(frozen=True)
class Sizes:
    """Numbers in a model: all weights, and those that are trained; `width` is bytes of one weight."""

    parameters: int
    trainable: int
    width: float
    layers: int
    hidden: int
    vocabulary: int = 0


def reference_plan(
    recipe: Recipe, tokens: float | None = None, sizes: Sizes | str = "", *, of_stages: bool = False
) -> str:
    """Which model is the reference and what it costs, in a few sentences.

    `tokens`: the most that scores are kept of; `sizes`: the model's numbers, or why they are not known. `of_stages`:
    there are several, each with a reference of its own.
    """
    if recipe.objective().reference == "none":
        names = ", ".join(loss.name for loss in recipe.loss)
        return f"none: {names} needs none, and no second model is loaded."
    model = "of each stage the model it starts from." if of_stages and not recipe.reference.model else _model(recipe)
    return f"{model} {_source(recipe, tokens, sizes)}"


def reference_bytes(recipe: Recipe, tokens: float | None, sizes: Sizes) -> float:
    """Bytes that lie beside the policy for its reference: a second model, or the head that hidden states go with.

    A reference that moves has weights of its own, of an adapter too, and in half precision their average.
    """
    if recipe.objective().reference == "none":
        return 0.0
    if _is_live(recipe, tokens, sizes):
        held = sizes.parameters * sizes.width if _is_second(recipe) else 0.0
        return held + _moving_bytes(recipe, sizes)
    copied = recipe.objective().reference == "distribution" and _form(recipe) == HIDDEN and _head_trains(recipe)
    return sizes.vocabulary * sizes.hidden * sizes.width if copied else 0.0


def _moving_bytes(recipe: Recipe, sizes: Sizes) -> float:
    rule = _rule(recipe)
    if rule is None:
        return 0.0
    if not _is_second(recipe):
        return sizes.trainable * ADAPTER_WIDTH
    return sizes.parameters * AVERAGE_WIDTH if rule.holds_average(sizes.width) else 0.0


def _rule(recipe: Recipe) -> SyncRule | None:
    return sync_rule(asdict(recipe.reference))


def _model(recipe: Recipe) -> str:
    if recipe.reference.model:
        return f"{recipe.reference.model}, as the recipe says."
    if recipe.model.use_peft:
        how = "a copy of its adapter" if _rule(recipe) else "its adapter switched off"
        return f"the starting model: the policy with {how}."
    return "the starting model."


def _source(recipe: Recipe, tokens: float | None, sizes: Sizes | str) -> str:
    store = recipe.reference.store or default_folder()
    kept = _kept_bytes(recipe, tokens, sizes)
    if rule := _rule(recipe):
        held = "A second model" if _is_second(recipe) else "A copy of the adapter"
        return f"It follows the policy, {rule}. {_LIVE} {held} is held for it, and kept in every checkpoint."
    if _is_live(recipe, tokens, sizes):
        why = "" if kept is None or recipe.reference.source == "live" else f" Keeping it would take {size(int(kept))}."
        held = "A second model is held for it." if _is_second(recipe) else "No second model is held."
        return f"{_LIVE}{why} {held}"
    if recipe.objective().reference != "distribution":
        return (
            f"Each answer is scored once, before training, and kept in {store}, where later runs find it. No second "
            "model is held while the policy trains."
        )
    words = {HIDDEN: "final hidden states, with a copy of the head", EXPECTED: "expected rows of its head"}
    amount = "how much is not known here" if kept is None else f"at most {size(int(kept))}"
    return (
        f"Whole next-token distributions are kept once, before training, in {store}: {words[_form(recipe)]}, {amount}. "
        f"`auto` keeps {size(SMALL)}; beyond that the reference is scored beside the policy."
    )


def _is_live(recipe: Recipe, tokens: float | None, sizes: Sizes | str) -> bool:
    source, kept = recipe.reference.source, _kept_bytes(recipe, tokens, sizes)
    return source == "live" or _rule(recipe) is not None or (source == "auto" and kept is not None and kept > SMALL)


def _kept_bytes(recipe: Recipe, tokens: float | None, sizes: Sizes | str) -> float | None:
    """Bytes in the store for a loss that compares whole distributions; None for others, and where it is not known."""
    if recipe.objective().reference != "distribution" or tokens is None or isinstance(sizes, str):
        return None
    width = expected_bytes(sizes.hidden) if _form(recipe) == EXPECTED else max(2.0, sizes.width) * sizes.hidden
    return tokens * width


def _form(recipe: Recipe) -> str:
    """The form that is likely: what only the loaded model tells, such as a soft cap, is not looked for."""
    if recipe.reference.form != "auto":
        return recipe.reference.form
    simple = FROM_EXPECTED.issuperset(recipe.objective().statistics)
    return EXPECTED if simple and not _head_trains(recipe) and not recipe.reference.model else HIDDEN


def _head_trains(recipe: Recipe) -> bool:
    return not recipe.model.use_peft or any("head" in name for name in recipe.model.lora_modules_to_save or ())


def _is_second(recipe: Recipe) -> bool:
    """Whether a live reference is another model beside the policy."""
    return recipe.reference.model is not None or not recipe.model.use_peft
