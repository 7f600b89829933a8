"""A trainer's run in the words of a recipe and a report, for the card of a run that came from no recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config import DEFAULTS_SHOWN, PreferenceConfig
from prefopt.data.dataset import TokenDataset
from prefopt.drift import loss_facts
from prefopt.report.card import model_card, write_card
from prefopt.report.plots import save_plots
from prefopt.report.results import devices, versions, write_results

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

# Settings that the device, the launcher or the screen decide where nobody does.
_DERIVED = (
    "accelerator_config", "dataloader_pin_memory", "debug", "disable_tqdm", "gradient_checkpointing", "hub_token",
    "report_to", "use_cpu",
)  # fmt: skip


def write_report(trainer: PreferenceTrainer, license: str | None = None) -> None:
    """Leave `results.json`, `plots/` and the card in the run folder, as a run from a recipe does."""
    folder = Path(str(trainer.args.output_dir))
    fingerprints = {name: rows.fingerprint for name, rows in _splits(trainer).items()}
    write_results(folder, {**results_of(trainer), "fingerprint": fingerprints})
    save_plots(folder, trainer.state.log_history)
    write_card(folder, settings_of(trainer), base_model=_base(trainer), loss_docs=_docs(trainer), license=license)


def card_so_far(trainer: PreferenceTrainer, files: Collection[str]) -> str:
    """The card of a run that is still training, to lie beside `files`: its last figures, without curves."""
    settings, state = settings_of(trainer), trainer.state
    return model_card(
        settings,
        {"versions": versions(), "devices": devices(), **results_of(trainer)},
        base_model=_base(trainer),
        title=str(settings.get("hub_model_id") or Path(str(trainer.args.output_dir)).resolve().name),
        loss_docs=_docs(trainer),
        adapter="adapter_config.json" in files,
        chat="chat_template.jinja" in files,
        recipe_file="recipe.yaml" in files,
        note=f"**Training goes on**: this is the model after step {state.global_step} of {state.max_steps}.",
    )


def settings_of(trainer: PreferenceTrainer) -> Mapping[str, Any]:
    """The recipe of the run; else the losses, and every training setting that is not at its default."""
    if trainer.recipe is not None:
        return trainer.recipe
    # Not compared with a fresh `PreferenceConfig`: building one resets accelerate's state under a running trainer.
    values, known = trainer.args.to_dict(), fields(PreferenceConfig)
    changed = [field.name for field in known if field.name not in _DERIVED and values[field.name] != _default(field)]
    return {
        **({"model_name_or_path": _base(trainer)} if _base(trainer) else {}),
        "loss": loss_facts(trainer.objective)["loss"],
        **{name: values[name] for name in dict.fromkeys((*DEFAULTS_SHOWN, *changed))},
    }


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def results_of(trainer: PreferenceTrainer) -> dict[str, Any]:
    """The last figures of a run, and what became of its rows."""
    history = trainer.state.log_history
    return {
        "train": next((line for line in reversed(history) if "loss" in line), {}),
        "eval": next((line for line in reversed(history) if "eval_loss" in line), {}),
        "data": {name: rows.reports.get("tokens", {}) for name, rows in _splits(trainer).items()},
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
    }


def _splits(trainer: PreferenceTrainer) -> dict[str, TokenDataset]:
    evaluation = trainer.eval_dataset
    several = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    return {name: rows for name, rows in {"train": trainer.train_dataset, **several}.items() if rows is not None}


def _base(trainer: PreferenceTrainer) -> str | None:
    return getattr(trainer.model.config, "_name_or_path", None) or None


def _docs(trainer: PreferenceTrainer) -> dict[str, str]:
    return {loss.name: type(loss).__doc__ or "" for loss in trainer.objective.losses}
