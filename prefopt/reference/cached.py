"""Reference scores as columns of the data: computed once for a model and an answer, found again by every later run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from prefopt.data.collation import Collator
from prefopt.data.dataset import TokenDataset
from prefopt.errors import UserError
from prefopt.reference.answers import Answer, answers_of, with_scores
from prefopt.reference.fill import Filler, Scores
from prefopt.reference.forms import LogProbs, WholeForm
from prefopt.reference.identity import Identity, identify
from prefopt.reference.live import AdapterOff, FrozenModel, LiveReference, StartingPolicy
from prefopt.reference.store import Entry
from prefopt.reference.stored import StoredAnswer
from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.rounding import BEYOND, rounding_bound

# So many of the answers that were found are scored once more, to see that the store speaks of this model.
_CHECKED = 4


@dataclass
class Account:
    """What a run asked of the store: answers it needed, found there, scored itself, and scored again as a check."""

    answers: int = 0
    found: int = 0
    scored: int = 0
    checked: int = 0
    seconds: float = 0.0


class CachedReference:
    """Scores that are made before training by `source`, kept in a store, and laid beside the rows.

    `entry` is the store's file for this function, None on all ranks but the main one; `form` is what it holds, and
    `path` where it lies. `batch_size` is the number of the longest answers that are scored together. After `close` no
    new answer can be scored; those in the store are still found.
    """

    def __init__(
        self,
        source: LiveReference,
        identity: Identity,
        entry: Entry | None,
        form: LogProbs | WholeForm,
        path: Path,
        *,
        collator: Collator,
        batch_size: int,
        all_completions: bool,
    ) -> None:
        self.source: LiveReference | None = source
        self.identity = identity
        self.entry = entry
        self.form = form
        self.path = path
        self.collator = collator
        self.batch_size = batch_size
        self.all_completions = all_completions
        self.is_start = source.is_start
        self.account = Account()
        self._attached = False
        self._of = source.summary.removeprefix("live: ")

    @property
    def summary(self) -> str:
        """One line for the log: whose scores, and how many were there already."""
        account = self.account
        return (
            f"cached: {self._of}; of {account.answers:,} answers {account.found:,} found in the store, "
            f"{account.scored:,} scored in {account.seconds:.1f} s"
        )

    def prepare(self, accelerator: Accelerator) -> None:
        """Take note of the ranks; the model that scores is in its place already."""
        self.accelerator = accelerator

    def attach(self, policy: nn.Module, *datasets: TokenDataset) -> list[TokenDataset]:
        """The data sets with their reference scores, found or computed. Every rank calls this with the same rows.

        Raises `UserError` when the ranks hold different rows, when the store does not speak of this model, or when
        scores are missing after `close`.
        """
        start = time.monotonic()
        known = [self._has_scores(data) for data in datasets]
        new = (data for data, has_scores in zip(datasets, known, strict=True) if not has_scores)
        answers = answers_of(new, all_completions=self.all_completions)
        _refuse_other_rows(answers)
        scores = self._scores(policy, answers) if answers else {}
        self._attached = True
        self.account.seconds += time.monotonic() - start
        return [
            data if has_scores else self._with(data, scores) for data, has_scores in zip(datasets, known, strict=True)
        ]

    def scores(self, policy: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The column of the batch; nothing is computed."""
        _refuse_missing(batch, self.form.column)
        empty = torch.zeros(0, device=batch["source"].device)
        return {"ref_logp": batch.get("ref_logp", empty)}

    def distribution(self, policy: nn.Module, batch: dict[str, Any]) -> Distribution | ExpectedRows:
        """The reference's distributions at the tokens of the batch, which brings them along."""
        assert not isinstance(self.form, LogProbs)
        _refuse_missing(batch, self.form.column)
        return self.form.given(batch.get(self.form.column), like=batch["source"])

    def close(self) -> None:
        """Let go of the model that scored: training moves it. An adapter can be switched off at any time."""
        if not isinstance(self.source, AdapterOff):
            self.source = None

    def _scores(self, policy: nn.Module, answers: Mapping[bytes, Answer]) -> Scores:
        place = None if isinstance(self.form, LogProbs) else self._place
        filler = Filler(self.accelerator, self.entry, self._scorer(policy), self.collator, self.batch_size, place)
        found = filler.read(answers)
        missing = answers.keys() - found.keys()
        self.account.answers += len(answers)
        self.account.found += len(found)
        if missing and not self._can_score(policy):
            raise UserError(
                f"{len(missing):,} answers have no reference scores, and the model that gives them is gone: the policy "
                "has moved. Give these rows to the trainer as `eval_dataset` before training, write "
                "reference: {source: live} to keep the reference beside the policy, or evaluate the saved model with "
                "`prefopt evaluate --reference`"
            )
        if not self._attached:
            self._check(policy, filler, found, answers)
        if missing:
            fresh, computed = filler.fill(answers, found)
            self.account.scored += computed
            found.update(fresh)
        return found

    def _can_score(self, policy: nn.Module) -> bool:
        """Whether the model that scores is still what it was when it was identified."""
        if not isinstance(self.source, StartingPolicy) or not self._attached:
            return self.source is not None
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return identify(policy, compute_dtype=precision).key == self.identity.key

    def _scorer(self, policy: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
        def score(batch: dict[str, Any]) -> Tensor:
            assert self.source is not None
            with self.accelerator.autocast():
                return self.form.numbers(self.source, policy, batch)

        return score

    def _check(self, policy: nn.Module, filler: Filler, found: Scores, answers: Mapping[bytes, Answer]) -> None:
        """Score some of what was found anew. Raises `UserError` when it differs by more than rounding explains."""
        # Not from the global random state, which a run with a warm store must leave as one with a cold store does.
        chosen = random.Random().sample(sorted(found), min(_CHECKED, len(found)))
        chosen = broadcast_object_list([chosen])[0]
        again = filler.rescored(chosen, answers)
        self.account.checked += len(chosen)
        model = self.source.model if isinstance(self.source, FrozenModel) else policy
        precision = self.accelerator.mixed_precision
        gaps = [gap for id, numbers in again.items() for gap in self.form.gaps(numbers, found[id])]
        bounds = [rounding_bound(model, precision, gap.tokens) for gap in gaps]
        beyond = [(gap, bound) for gap, bound in zip(gaps, bounds, strict=True) if not gap.size <= BEYOND * bound]
        # Kernels differ between devices, and one rank must not stop alone.
        for gap, bound in gather_object(beyond)[:1]:
            place = broadcast_object_list([str(self.entry.path) if self.entry is not None else ""])[0]
            raise UserError(
                f"{place}: what is stored of an answer differs from the reference model's by {gap.size:.3g}{gap.unit}, "
                f"and rounding explains {bound:.1e}. Something outside its weights and configuration "
                "changes this model (hooks, a patched forward), or the file was written by such a model. Delete the "
                "file, or write reference: {source: live}."
            )

    def _has_scores(self, data: TokenDataset) -> bool:
        """Whether the rows carry the scores of this function, and of each answer that is read."""
        ids = data.answer_ids[0] if data.reference == self._name else {"": b""}
        wanted = [side for side in ids if self.all_completions or side != "rejected"]
        return all(f"{side}_{self.form.column}" in data.rows[0] for side in wanted)

    def _with(self, data: TokenDataset, scores: Scores) -> TokenDataset:
        return with_scores(data, scores, self.form.column, self._name, all_completions=self.all_completions)

    @property
    def _name(self) -> str:
        return f"{self.form.kind}-{self.identity.key}"

    def _place(self, id: bytes) -> StoredAnswer:
        return StoredAnswer(self.path, self.identity.key, id)


def _refuse_missing(batch: dict[str, Any], column: str) -> None:
    if batch["size"] and column not in batch:
        raise UserError(
            f"a batch has no reference scores: a data collator of your own has to pass `{column}` on, as "
            "prefopt.data.collation.Collator does, or write reference: {source: live}"
        )


def _refuse_other_rows(answers: Mapping[bytes, Answer]) -> None:
    """The ranks share the work, so each must know the same answers, in whatever order."""
    digests = set(gather_object([sha256(b"".join(sorted(answers))).hexdigest()]))
    if len(digests) > 1:
        raise UserError("the ranks hold different rows: give every process the same data set; the trainer shards it")
