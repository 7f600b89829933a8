"""What procedures of several rounds share: settings, a value for each round, folders, and the recipe of each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefopt.errors import RecipeError
from prefopt.generation.sampling import Sampling
from prefopt.judges import check_judge
from prefopt.losses import get
from prefopt.losses.knobs import knobs_of
from prefopt.procedures.stage import refuse_unknown
from prefopt.recipe.sections import DataSection, LossSpec

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

PAIRS, TEST_PAIRS = "pairs.jsonl", "test_pairs.jsonl"
OWN, HELD_OUT = "own", "held_out"
ROUND_SETTINGS = ("learning_rate", "num_train_epochs")
BETA = "beta"
LENGTHS = ("max_length", "truncation_mode", "cut_answers", "min_prompt_tokens", "prompt_boundary", "max_dropped")
_OPTIONAL = ("prompts", "vllm_max_model_length")
_COUNTS = ("rounds", "eval_prompts", "max_new_tokens", "generation_batch_size", "shard_size", *_OPTIONAL)

Settings = TypeVar("Settings", bound="RoundSettings")


@dataclass(frozen=True)
class RoundSettings:
    """The settings of a procedure with rounds, by their names in its block; `RecipeError` for one out of range.

    `prompts`: how many of the data are used, all when None; `eval_prompts`: how many of the held-out ones answers are
    measured on. The next five say how answers are drawn; `use_vllm`: by vLLM, with the next two for its memory
    (`vllm_max_model_length`: of prompt and answer, the model's own limit when None). `beta`, `learning_rate` and
    `num_train_epochs` hold a value for each round; the last one goes on. `measure`: judges by names of yours,
    `{kindness: {function: ...}}`; their mean scores of the answers to held-out prompts are figures of each round, and
    nothing is trained on them.
    """

    rounds: int = 3
    prompts: int | None = None
    eval_prompts: int = 512
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    generation_batch_size: int = 64
    shard_size: int = 1024
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.9
    vllm_max_model_length: int | None = None
    beta: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    num_train_epochs: tuple[float, ...] = ()
    measure: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if name not in _OPTIONAL or getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.use_vllm, bool):
            raise RecipeError("procedure.use_vllm: must be true or false.")
        for name in ("temperature", "top_p", "vllm_gpu_memory_utilization"):
            if not _is_number(getattr(self, name)):
                raise RecipeError(f"procedure.{name}: must be a number, not {getattr(self, name)!r}.")
        if not self.temperature > 0:
            raise RecipeError("procedure.temperature: must be above 0, or the rounds would sample nothing.")
        for name in ("top_p", "vllm_gpu_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"procedure.{name}: must be above 0 and at most 1.")
        if not isinstance(self.measure, dict) or not all(str(name).isidentifier() for name in self.measure):
            raise RecipeError("procedure.measure: must be judges by name. Write measure: {kindness: {function: ...}}.")
        for name, block in self.measure.items():
            check_judge(block, f"measure.{name}")

    @property
    def judges(self) -> list[dict[str, Any]]:
        """The blocks of all judges that a run opens."""
        return list(self.measure.values())

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return 1

    def told_prompts(self, *, train: bool) -> str:
        """The prompts that answers are sampled to, in words."""
        held_out = f"at most {self.eval_prompts} held-out prompts"
        own = f"at most {self.prompts}" if self.prompts else "all"
        return f"{own} and {held_out}" if train else held_out

    def sampling(self, round: int, seed: int) -> Sampling:
        """How the answers of a round are drawn."""
        return Sampling(self.samples, self.max_new_tokens, self.temperature, self.top_p, seed + round)


def read_settings(
    kind: type[Settings], recipe: Recipe, *, besides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Settings:
    """The settings in a recipe's `procedure` block. `defaults` stand for what neither block nor recipe says.

    A value that the recipe itself writes, such as `learning_rate`, holds for all rounds. Raises `RecipeError`.
    """
    given = {name: value for name, value in recipe.procedure.items() if name not in ("name", *besides)}
    refuse_unknown(recipe, *besides, *(field.name for field in fields(kind)))
    own = _own_values(recipe)
    for name in own.keys() & given.keys():
        raise RecipeError(f"procedure.{name}: {own[name]} Keep one of the two.")
    rounds = given.get("rounds", (defaults or {}).get("rounds", kind.rounds))
    for name in (BETA, *ROUND_SETTINGS):
        if name in given:
            given[name] = _values(name, given[name])
            if isinstance(rounds, int) and len(given[name]) > rounds:
                raise RecipeError(f"procedure.{name}: has more values than there are rounds ({rounds}).")
    kept = {name: value for name, value in (defaults or {}).items() if name not in own}
    settings = kind(**{**kept, **given})
    if settings.use_vllm and (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        raise RecipeError("procedure.use_vllm: vLLM would sample from the whole weights, not from the quantised ones.")
    return settings


def at_round(values: Sequence[float], round: int) -> float:
    """The value of a round; the last one goes on."""
    return values[min(round, len(values) - 1)]


def round_folder(recipe: Recipe, round: int) -> Path:
    """Where the files of a round lie."""
    return Path(recipe.output_dir) / f"round-{round}"


def answers_folder(recipe: Recipe, round: int) -> Path:
    """Where the answers of the model that a round starts from lie: those to train on in `own`, others in `held_out`."""
    return round_folder(recipe, round) / "answers"


def model_folder(recipe: Recipe, round: int, rounds: int) -> Path:
    """Where the model of a round is left: the last one's in the run folder itself."""
    return Path(recipe.output_dir) if round == rounds - 1 else round_folder(recipe, round)


def round_recipe(recipe: Recipe, settings: RoundSettings, round: int, *, has_test: bool) -> Recipe:
    """The recipe that one round trains: the model of the round before, this round's pairs, and its own settings."""
    folder, last = round_folder(recipe, round) / "pairs", round == settings.rounds - 1
    pairs = {"train": str(folder / PAIRS), **({"test": str(folder / TEST_PAIRS)} if has_test else {})}
    changes: dict[str, Any] = {
        **data_from(pairs),
        "output_dir": str(model_folder(recipe, round, settings.rounds)),
        "procedure": {},
        "loss": _losses(recipe.loss, settings, round),
    }
    for name in ROUND_SETTINGS:
        if getattr(settings, name):
            changes[name] = at_round(getattr(settings, name), round)
    if not last:
        # A checkpoint that is named is one of the last round, whose folder is the recipe's own.
        resume = "never" if recipe.training.get("resume") == "never" else "auto"
        changes |= {"resume": resume, "push_to_hub": False}
    return start_recipe(recipe, round, settings.rounds).replace(changes)


def data_from(files: dict[str, str]) -> dict[str, Any]:
    """Changes to a recipe that make these files all its data, but for a second stream of targets."""
    return {**{field.name: None for field in fields(DataSection) if field.name != "targets"}, "data_files": files}


def start_recipe(recipe: Recipe, round: int, rounds: int) -> Recipe:
    """The recipe with the model that a round starts from; `round == rounds` gives the model that is left at the end."""
    if round == 0:
        return recipe
    before = str(model_folder(recipe, round - 1, rounds))
    return recipe.replace(model_name_or_path=before, model_revision=None, from_scratch=None)


def refuse_other_reference(recipe: Recipe) -> None:
    """Raise `RecipeError` for a reference model that is named: each round's is the model the round starts from."""
    if recipe.reference.model is not None:
        raise RecipeError(
            "reference.model: the reference of each round is the model that the round starts from. Remove it."
        )


def refuse_unmeasured(recipe: Recipe, settings: RoundSettings) -> None:
    """Raise `RecipeError` for something to measure and no held-out prompts to measure it on."""
    if settings.measure and not recipe.evaluates:
        raise RecipeError("procedure.measure: needs held-out rows. Write test_split_size: 200, or name a test file.")


def refuse_no_data(recipe: Recipe) -> None:
    """Raise `RecipeError` for a recipe without data: there would be no prompts."""
    data = recipe.data
    if not (data.dataset_name or data.data_files or data.datasets):
        raise RecipeError("dataset_name: is missing. Write dataset_name, or data_files: [answers.jsonl].")


def check_count(name: str, value: Any) -> None:
    """Raise `RecipeError` unless a setting is a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"procedure.{name}: must be a whole number from 1 on, not {value!r}.")


def _losses(losses: Sequence[LossSpec], settings: RoundSettings, round: int) -> Any:
    """The `loss` block with the beta of a round, for losses that have one."""
    blocks = []
    for loss in losses:
        own = {BETA: at_round(settings.beta, round)} if settings.beta and _has_beta(loss) else {}
        blocks.append({"name": loss.name, **loss.knobs, **own})
    return blocks if len(blocks) > 1 else blocks[0]


def _own_values(recipe: Recipe) -> dict[str, str]:
    """What the recipe says for all rounds at once, with the reason why its block cannot say it for each."""
    own = {
        name: f"contradicts `{name}` of the recipe, which holds for all rounds."
        for name in ROUND_SETTINGS
        if name in recipe.training
    }
    if recipe.training.get("max_steps", 0) > 0:
        own["num_train_epochs"] = "has no effect beside max_steps."
    if any(BETA in loss.knobs for loss in recipe.loss):
        own[BETA] = f"contradicts `loss.{BETA}`, which holds for all rounds."
    elif not any(map(_has_beta, recipe.loss)):
        own[BETA] = f"{' and '.join(loss.name for loss in recipe.loss)} has none."
    return own


def _has_beta(loss: LossSpec) -> bool:
    return any(knob.name == BETA for knob in knobs_of(get(loss.name)))


def _values(name: str, given: Any) -> tuple[float, ...]:
    values = given if isinstance(given, (list, tuple)) else [given]
    if not all(_is_number(value) and value > 0 for value in values):
        raise RecipeError(f"procedure.{name}: must be a number above 0, or a list of them, not {given!r}.")
    return tuple(float(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
