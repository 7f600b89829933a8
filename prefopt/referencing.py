"""Which reference a trainer compares with, and where its scores come from: a store, or a model beside the policy."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from prefopt.console import say
from prefopt.data.collation import Collator
from prefopt.data.dataset import TokenDataset
from prefopt.errors import UserError
from prefopt.following import follow, source_of_scores
from prefopt.reference.answers import Answer, answers_of
from prefopt.reference.cached import CachedReference
from prefopt.reference.choosing import choose_form
from prefopt.reference.forms import SMALL, LogProbs, WholeForm
from prefopt.reference.identity import ADAPTER_OFF, Identity, identify
from prefopt.reference.live import (
    AdapterOff,
    FrozenModel,
    LiveReference,
    Reference,
    StartingPolicy,
    plan_of,
    plan_reference,
)
from prefopt.reference.record import check_reference, record_reference
from prefopt.reference.rule import sync_rule
from prefopt.reference.store import Entry, Store, entry_path
from prefopt.reference.upkeep import size

if TYPE_CHECKING:
    from prefopt.trainer import PreferenceTrainer

# Answers scored together for each row of a training batch: without gradients they take a fraction of the memory.
_TOGETHER = 8
_ROW_OVERHEAD = 200  # bytes of a row's id and checksum, and of their places in the file
_GB = 10**9


def open_reference_scores(
    trainer: PreferenceTrainer, explicit: nn.Module | None, *, fresh_adapter: bool
) -> tuple[Reference, Identity | None]:
    """The reference of a trainer and what function it is, before training moves the policy.

    `explicit` is a model asked for by name. Where scores are cached, those of all the trainer's rows are found or made
    here. Raises `UserError` for a model that cannot be the reference, or for a store that cannot be used though
    `source: cached` asks for one.
    """
    need, rule = trainer.objective.reference, sync_rule(trainer.args.reference)
    source = source_of_scores(trainer)
    options: dict[str, Any] = {"fresh_adapter": fresh_adapter, "explicit": explicit, "moves": rule is not None}
    cached = need != "none" and source != "live" and not _is_sharded(trainer, must=source == "cached")
    reference = plan_reference(need, trainer.model, before_training=cached, **options)
    if not isinstance(reference, LiveReference):
        return reference, None
    identity = identify_reference(trainer, reference)
    if cached:
        _place(trainer)
    reference.prepare(trainer.accelerator)
    if rule is not None:
        follow(trainer, reference, rule)
    if cached:
        stored = _cached(trainer, reference, identity, must=source == "cached")
        if stored is not None:
            stored.prepare(trainer.accelerator)
            attach_all(trainer, stored)
            return stored, identity
        if isinstance(reference, StartingPolicy):
            live = plan_reference(need, trainer.model, **options)
            live.prepare(trainer.accelerator)
            return live, identity
    return reference, identity


def score_both(
    policy: nn.Module, reference: Reference, need: str, batch: dict[str, Any], statistics: tuple[str, ...]
) -> dict[str, Tensor]:
    """The policy's `statistics` at the tokens of a batch and, if there is a `need` for a reference, its `ref_logp`.

    The reference goes first: its activations are gone when the policy's, kept for the backward pass, are made.
    """
    if need == "distribution":
        assert isinstance(reference, (LiveReference, CachedReference))  # no other source is let in for this need
        whole = reference.distribution(policy, batch)
        return policy(**plan_of(batch), statistics=(*statistics, "ref_logp"), reference=whole)
    known = reference.scores(policy, batch)
    return {**policy(**plan_of(batch), statistics=statistics), **known}


def _is_sharded(trainer: PreferenceTrainer, *, must: bool) -> bool:
    """Whether the policy will be sharded: before training it has no wrapper yet through which it could score."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and must:
        raise UserError(
            "reference: with FSDP and DeepSpeed scores cannot be cached yet. Write reference: {source: live}"
        )
    return sharded


def _place(trainer: PreferenceTrainer) -> None:
    """Put the policy on its device; with evaluation in half precision the stock trainer does that later."""
    args = trainer.args
    if (args.fp16_full_eval or args.bf16_full_eval) and not trainer.is_model_parallel:
        trainer._move_model_to_device(trainer.model, args.device)


def attach_all(trainer: PreferenceTrainer, reference: CachedReference) -> None:
    """Lay the reference's scores beside the rows of every data set of a trainer, in one pass."""
    done = iter(reference.attach(trainer.model, *_datasets(trainer)))
    if trainer.train_dataset is not None:
        trainer.train_dataset = next(done)
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {name: next(done) for name in trainer.eval_dataset}
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = next(done)


def attach(trainer: PreferenceTrainer, data: TokenDataset) -> TokenDataset:
    """Rows that come after the trainer was made, with their reference scores where those are a column."""
    if isinstance(trainer.reference, CachedReference):
        return trainer.reference.attach(trainer.model, data)[0]
    return data


def begin_training(trainer: PreferenceTrainer, *, resumed: bool) -> None:
    """Before the first step: keep `reference.json`, or compare a resumed run with it, and let go of what has scored.

    Raises `UserError` when a resumed run has another reference than it began with.
    """
    identity, problem = trainer.reference_identity, ""
    if identity is not None and trainer.accelerator.is_main_process:
        folder = Path(str(trainer.args.output_dir))
        try:
            if resumed and "reference" not in (trainer.args.allow_change or []):
                check_reference(folder, identity)
            rule = sync_rule(trainer.args.reference)
            record_reference(folder, identity, trainer.reference.summary, asdict(rule) if rule else None)
        except (UserError, OSError) as error:
            problem = str(error)
    if problem := broadcast_object_list([problem])[0]:
        raise UserError(problem)
    if isinstance(trainer.reference, CachedReference):
        trainer.reference.close()


def identify_reference(trainer: PreferenceTrainer, reference: Reference) -> Identity:
    """What function a live reference is."""
    model = reference.model if isinstance(reference, FrozenModel) else trainer.model
    adapter: Any = None
    if isinstance(reference, AdapterOff):
        adapter = ADAPTER_OFF if reference.adds_nothing else reference.adapter
    return identify(model, adapter=adapter, compute_dtype=_compute_dtype(trainer))


def identify_policy(trainer: PreferenceTrainer, *, fresh_adapter: bool) -> Identity:
    """What function the policy is as it stands; `fresh_adapter`: without the adapter, which adds nothing yet."""
    adapter = ADAPTER_OFF if fresh_adapter else None
    return identify(trainer.model, adapter=adapter, compute_dtype=_compute_dtype(trainer))


def _compute_dtype(trainer: PreferenceTrainer) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)


def _cached(
    trainer: PreferenceTrainer, source: LiveReference, identity: Identity, *, must: bool
) -> CachedReference | None:
    """The reference by way of the store; None, and a line that says why, where the scores are better made live."""
    settings, args = trainer.args.reference or {}, trainer.args
    collator = Collator(
        trainer.preparation.tokenizer.pad_token_id or 0, False, pad_to_multiple_of=args.pad_to_multiple_of or 1
    )
    form: LogProbs | WholeForm = LogProbs()
    if trainer.objective.reference == "distribution":
        wanted = settings.get("form", "auto")
        with trainer.accelerator.autocast():
            form = choose_form(wanted, source, trainer.model, collator, trainer.objective.statistics)
    answers = answers_of(_datasets(trainer), all_completions=trainer.objective.all_completions)
    store = Store(settings.get("store"))
    entry, reason = None, ""
    if trainer.accelerator.is_main_process:
        try:
            entry, reason = _open_entry(trainer, store, identity, form, answers, must=must)
        except (UserError, OSError) as error:
            reason = str(error)
    reason = broadcast_object_list([reason])[0]
    if not reason and isinstance(form, WholeForm):
        reason = _out_of_sight(store.folder)
    if reason and must:
        raise UserError(reason)
    if reason:
        say(f"reference: {reason.rstrip('.')}. The reference is scored beside the policy")
        return None
    return CachedReference(
        source,
        identity,
        entry,
        form,
        entry_path(store.folder, identity.key, form.kind),
        collator=collator,
        batch_size=settings.get("batch_size") or _TOGETHER * args.per_device_train_batch_size,
        all_completions=trainer.objective.all_completions,
    )


def _open_entry(
    trainer: PreferenceTrainer,
    store: Store,
    identity: Identity,
    form: LogProbs | WholeForm,
    answers: Mapping[bytes, Answer],
    *,
    must: bool,
) -> tuple[Entry | None, str]:
    """The store's file for a function, or why it is not used; only the main process asks."""
    entry = store.entry(identity.key, identity.about, form.kind)
    missing = entry.missing(answers)
    needed = sum(form.token_bytes * answers[id].length + _ROW_OVERHEAD for id in missing)
    reason = "" if must else _more_work(trainer, answers, len(missing)) or _too_much(form, needed)
    reason = reason or _no_room(store, needed, (trainer.args.reference or {}).get("max_gb"))
    if missing and not reason:
        say(
            f"reference: {len(missing):,} of {len(answers):,} answers are to be scored; {size(needed)} of {form.words} "
            f"will be written to {store.folder}"
        )
    return (None if reason else entry), reason


def _too_much(form: LogProbs | WholeForm, needed: int) -> str:
    """Why whole distributions are better made than kept, or nothing."""
    if isinstance(form, LogProbs) or needed <= SMALL:
        return ""
    return f"{size(needed)} of {form.words} would have to be kept, and `auto` keeps {size(SMALL)} at most"


def _out_of_sight(folder: Path) -> str:
    """Why a process could not read what the main one writes, or nothing; every rank asks."""
    blind = [rank for rank, sees in enumerate(gather_object([folder.is_dir()])) if not sees]
    if not blind:
        return ""
    return f"process {blind[0]} does not see the folder of the store, {folder}: it must be one that all share"


def _more_work(trainer: PreferenceTrainer, answers: Mapping[bytes, Answer], missing: int) -> str:
    """Why scoring everything first is more work than scoring what a short run reads, or nothing."""
    args, data = trainer.args, trainer.train_dataset
    if data is None:
        return ""
    rows = args.num_train_epochs * len(data)
    if args.max_steps > 0:
        rows = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    # Evaluation rows are read as well, once or more.
    train = answers_of([data], all_completions=trainer.objective.all_completions)
    read = int(rows / len(data) * len(train)) + len(answers) - len(train)
    if rows >= len(data) or missing <= read:
        return ""
    return f"{missing:,} answers would be scored for a run that reads {read:,}"


def _no_room(store: Store, needed: int, max_gb: float | None) -> str:
    """Why there is no room for what is going to be written, or nothing."""
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        return f"{store.folder} has {size(free)} free, and the scores need {size(needed)}"
    if needed and max_gb is not None and store.bytes() + needed > max_gb * _GB:
        return (
            f"{store.folder} holds {size(store.bytes())}, and {size(needed)} more would pass its limit, "
            f"reference.max_gb: {max_gb:g}. Raise it, or make room: prefopt cache gc --store {store.folder} --max_gb N"
        )
    return ""


def _datasets(trainer: PreferenceTrainer) -> list[TokenDataset]:
    evaluation: Any = trainer.eval_dataset
    several = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    return [data for data in (trainer.train_dataset, *several) if data is not None]
