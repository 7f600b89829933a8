"""PreferenceTrainer: rows -> plan -> model -> scores -> loss -> sums, on `transformers.Trainer`, and nothing else.

It never asks for a loss's name. What it adds to the stock loop is exactness: the loss of a step is the sum over its
units divided by their number over all micro-batches and ranks, evaluation counts each row once, and a non-finite step
stops before the optimizer moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, set_seed

from prefopt.checks import check_rows, check_start, check_step
from prefopt.compiling import compile_blocks
from prefopt.config import PreferenceConfig
from prefopt.data.collation import Batch
from prefopt.data.dataset import TokenDataset
from prefopt.data.prepare import WEIGHT
from prefopt.drift import loss_facts
from prefopt.durable import DurableTrainer
from prefopt.errors import NonFiniteError
from prefopt.following import reference_facts, reference_figures
from prefopt.launch import refuse_parallelism
from prefopt.layouts import choose_layout, is_shared, row_sampler
from prefopt.loading import batch_loader, to_device
from prefopt.losses import Loss, Objective, sides_of
from prefopt.losses.trial import try_losses
from prefopt.metrics import MetricSums
from prefopt.models import complete_tokenizer, open_model, open_reference, prepare_policy, tokenizer_of
from prefopt.offloading import offloading
from prefopt.predictions import Predictions
from prefopt.referencing import attach, begin_training, open_reference_scores, score_both
from prefopt.scoring import TokenScores
from prefopt.scoring.modes import evaluating
from prefopt.scoring.scores import OF_TURNS
from prefopt.token_budget import split_step
from prefopt.token_cache import preparation

# Sums of the loss's terms travel with the evaluation metrics under this prefix.
_TERM = "_term/"


class PreferenceTrainer(DurableTrainer):
    """Trains a causal language model on preferences with any registered loss. TRL's constructor, plus `loss`.

    `loss` is a registered name, a `Loss`, or an `Objective` (a weighted mixture). Data sets are raw rows (a
    `datasets.Dataset` or a list of dicts with `prompt`, `chosen`, `rejected`, or `prompt`, `completion`, `label`) or a
    `TokenDataset`. Without `ref_model` the reference is the policy as it stands at construction. Raises `UserError`
    for what a user can mend, before training starts.
    """

    # The loss is already divided by the count of the whole step.
    loss_is_scaled_for_ga = True

    # Narrower than in the base class.
    model: PreTrainedModel
    train_dataset: TokenDataset

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        loss: str | Loss | Objective | Sequence[str | Loss] = "dpo",
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
    ) -> None:
        args = args or PreferenceConfig(output_dir="runs/prefopt")
        self.objective: Objective = Objective.of(loss, args.loss_weights)
        try_losses(self.objective.losses)
        tokenizer = complete_tokenizer(processing_class or tokenizer_of(model, args))
        self.preparation = preparation(tokenizer, args, self.objective)
        train_dataset = check_rows(self.objective, self.preparation.train(train_dataset))
        eval_dataset = check_rows(self.objective, self.preparation.any(eval_dataset, "eval"), like=train_dataset)
        split_step(args, train_dataset, rejected=self.objective.all_completions)
        set_seed(args.seed)  # a fresh adapter draws its weights
        policy = prepare_policy(
            open_model(model, args, quantization_config),
            peft_config=peft_config,
            disable_dropout=args.disable_dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
        explicit = compile_blocks(open_reference(self.objective.reference, ref_model, args, quantization_config), args)
        self._eval_sums = MetricSums()
        self._predictions = Predictions(compute_metrics)
        self._estimates: dict[str, float] = {}
        self._window: list[tuple[Tensor, Tensor]] = []
        self._new_tokens = 0
        super().__init__(
            model=compile_blocks(policy, args),
            args=args,
            data_collator=data_collator or self.preparation.collator(train_dataset or eval_dataset, self.objective),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_parallelism(self.accelerator)
        self.reference, self.reference_identity = open_reference_scores(
            self, explicit, fresh_adapter=peft_config is not None
        )
        choose_layout(self, own_collator=data_collator is not None)
        self._offloading = offloading(self.model, args)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Blocks are compiled already, so accelerate compiles nothing around them."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _get_dataloader(  # type: ignore[override]
        self, dataset: TokenDataset, *, batch_size: int, is_training: bool = False, **about: Any
    ) -> DataLoader:
        sampler = row_sampler(self, dataset, batch_size=batch_size, is_training=is_training)
        return batch_loader(dataset, sampler, self.data_collator, self.args)

    def _prepare_input(self, data: Any) -> Any:
        return to_device(data, self.args.device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of an evaluation set: its name, a prepared data set, or raw rows, which are prepared first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            rows = check_rows(self.objective, self.preparation.one(eval_dataset, "eval"), like=self.train_dataset)
            eval_dataset = attach(self, rows)
        return super().get_eval_dataloader(eval_dataset)

    get_test_dataloader = get_eval_dataloader  # type: ignore[assignment]  # the rows of `predict`

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        begin_training(self, resumed=resume_from_checkpoint is not None)
        if not self.is_fsdp_enabled:
            # An evaluation before training leaves this mark, and the ranks would then train each for itself.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        # A resumed epoch wraps the batch sampler once more, out of the loop's own reach.
        kwargs["train_dataloader"].batch_sampler.set_epoch(kwargs["epoch"])
        if self.state.global_step == 0:
            check_start(self, kwargs["model"])
        super()._run_epoch(**kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of a step, and each loss term's number of units over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window.clear()
        self._new_tokens += sum(batch["tokens"] for batch in batches)
        for batch in batches:
            self._train_sums.add_sums(batch["reading"])
        if self.objective.has_estimates:
            self._estimates = self._estimate(batches)
        counts = torch.tensor([self.objective.counts(sides_of(batch)) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(counts.to(device), reduction="sum")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock step, with activations where the settings have them wait."""
        with self._offloading:
            return super().training_step(*args, **kwargs)

    def score(self, model: nn.Module, batch: Batch) -> TokenScores:
        """Policy and reference scores of the tokens of a batch that is on the device."""
        statistics = dict.fromkeys(("logp", "entropy", *self.objective.statistics))
        scores = score_both(model, self.reference, self.objective.reference, batch, tuple(statistics))
        known = {name: batch[name] for name in OF_TURNS if name in batch}
        return TokenScores(batch["size"], batch["sequence"], **scores, **known)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss: sums of its units over the counts of the whole step."""
        counts = num_items_in_batch
        if counts is None:  # called by hand: this batch is the whole step
            counts = torch.tensor(self.objective.counts(sides_of(inputs)))
            self._estimates = self._estimate([inputs]) if self.objective.has_estimates else {}
        scores, sums, metrics = self._loss_sums(model, inputs)
        # DDP, FSDP and DeepSpeed average gradients over ranks; the factor turns that into a sum.
        loss = self.objective.combine(sums, counts) * self.accelerator.num_processes
        self._train_sums.add(metrics)
        self._window.append((inputs["row"], loss.detach()))
        return (loss, scores) if return_outputs else loss

    def _loss_sums(self, model: nn.Module, batch: Batch) -> tuple[TokenScores, Tensor, dict[str, Tensor]]:
        """Scores of a batch, the sum of each loss term's values, and unreduced metrics."""
        scores = self.score(model, batch)
        columns = batch["columns"]
        sums, metrics = self.objective(scores, sides_of(batch), columns, self._estimates, columns.get(WEIGHT))
        return scores, sums, {**metrics, "entropy": scores.entropy}

    def _estimate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """What the loss asks to know of the whole step before its first backward: sums over counts, over all ranks."""
        sums = MetricSums()
        model = self.model_wrapped
        # The loop restores the random state after this, so nothing here may draw from it.
        with evaluating(model), torch.random.fork_rng(), self.accelerator.autocast():
            for raw in batches:
                batch: Batch = self._prepare_inputs(raw)
                parts = self._estimate_batch(model, batch) if self.objective.plain_estimates else {}
                if self.objective.mismatched:
                    parts |= self._estimate_batch(model, batch["mismatched"], mismatched=True)
                sums.add_sums(parts)
        return sums.reduce(self.accelerator)

    def _estimate_batch(self, model: nn.Module, batch: Batch, **about: bool) -> dict[str, tuple[Tensor, Tensor]]:
        return self.objective.estimates(self.score(model, batch), sides_of(batch), batch["columns"], **about)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        step = self.state.global_step + 1
        self.sigterm.agreed = check_step(self.accelerator, step, norm, self._window, self.sigterm.asked)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics since the last log: means over rows or tokens of all ranks."""
        if "loss" in logs:
            logs.update(self._train_sums.reduce(self.accelerator))
            logs.update(reference_figures(self), num_tokens=self._count_tokens())
        super().log(logs, start_time)

    def _count_tokens(self) -> int:
        new = self.accelerator.reduce(torch.tensor(self._new_tokens, device=self.args.device), reduction="sum")
        self._new_tokens = 0
        self.state.num_input_tokens_seen += int(new)
        return self.state.num_input_tokens_seen

    def _resume_facts(self) -> dict[str, Any]:
        layout = "shared" if is_shared(self.data_collator) else "plain"
        facts = {"data": self.train_dataset.fingerprint, "layout": layout}
        return {**loss_facts(self.objective), **reference_facts(self), **facts}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()  # the count is part of the saved state
        super()._save_checkpoint(model, trial)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Nothing: `get_batch_samples` counts them, whatever `include_num_input_tokens_seen` says."""

    def floating_point_ops(self, inputs: Batch) -> int:
        """Six flops a token and body parameter; the stock count walks the whole model at every micro-batch."""
        return 6 * inputs["tokens"] * self._body_parameters

    @cached_property
    def _body_parameters(self) -> int:
        return int(self.model.num_parameters(exclude_embeddings=True))

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Add a batch's sums and counts to the evaluation; nothing is gathered row by row."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores, sums, metrics = self._loss_sums(model, inputs)
        for term, (total, count) in enumerate(zip(sums, self.objective.counts(sides_of(inputs)), strict=True)):
            self._eval_sums.add_sum(f"{_TERM}{term}", total, count)
        self._eval_sums.add(metrics)
        self._predictions.add(inputs, scores)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop around exact sums: every row counts once, whatever the batch and the number of ranks."""
        self._eval_sums.clear()
        if self.objective.has_estimates:
            self._estimates = self._estimate(dataloader)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        figures = self._eval_sums.reduce(self.accelerator)
        terms = [figures.pop(f"{_TERM}{term}", 0.0) for term in range(len(self.objective.terms))]
        figures["loss"] = sum(weight * value for weight, value in zip(self.objective.weights, terms, strict=True))
        if not math.isfinite(figures["loss"]):
            raise NonFiniteError(f"evaluation after step {self.state.global_step}: the loss is {figures['loss']}")
        figures.update(self._predictions.metrics(metric_key_prefix))
        assert output.metrics is not None  # the stock loop always fills it
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output
