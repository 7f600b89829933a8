"""Does token-level KL control buy more reward for the same divergence? (TDPO, arXiv 2404.11999, figure 3 and table 1)

    python examples/claims/frontier.py [--seeds 3]      # the embedded world
    python examples/claims/frontier.py --data FOLDER    # real reviews: reviews_pos.txt and reviews_neg.txt in FOLDER

DPO, f-DPO with forward KL, TDPO1 and TDPO2 train on the same pairs; reward and KL to the base model are measured along
the way on held-out prompts. Compared at equal KL: at equal steps one loss has simply moved further than another. Two
tuned DPO baselines stand beside them, because a learning rate or a beta of its own moves DPO's curve as much as a loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from reviews import TINY, Size, World, make_world
from transformers import PreTrainedModel, TrainerCallback

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import Loss, make

KL = 2.0  # the most that the slowest of the compared lines reaches
LAST = 200
DENSE = (
    25,
    50,
    60,
    70,
    80,
    90,
    100,
)  # DPO passes the KL of the comparison early; a long chord would flatter the others
SPARSE = (25, 50, 100, 150, 200)
LONG = (50, 100, 150, 200, 250, 300)  # what is held back needs more steps to the same KL

REVIEWS = Size()
GRAMMAR = Size(vocabulary=1024, new_tokens=60)


@dataclass(frozen=True)
class Setting:
    """A line of the comparison: a loss, its learning rate, when it is measured, and how many seeds it gets."""

    label: str
    loss: Loss
    steps: tuple[int, ...] = SPARSE
    learning_rate: float = 2e-4
    tuned: bool = False


@dataclass
class Run:
    """What was measured of one run: the curve, and held-out figures at its end."""

    label: str
    seed: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)

    def at(self, name: str, kl: float = KL) -> float | None:
        """A figure of the curve where it has this KL, on the straight line between two measurements; None beyond it."""
        points = sorted((point["kl"], point[name]) for point in self.curve)
        for (left, low), (right, high) in pairwise(points):
            if left <= kl <= right:
                return low + (high - low) * (kl - left) / max(right - left, 1e-9)
        return None

    def end(self, name: str) -> float:
        """A figure at the last step that every line of the comparison has, or before it."""
        return next(point[name] for point in reversed(self.curve) if point["step"] <= LAST)


def settings() -> list[Setting]:
    """The lines of the comparison; those with `tuned` are DPO's answer to it."""
    return [
        Setting("DPO", make("dpo"), (*DENSE, 120, 150, 200)),
        Setting("f-DPO, forward KL", make("fdpo", divergence="forward_kl")),
        Setting("TDPO1", make("tdpo1")),
        Setting("TDPO2, alpha 0.25", make("tdpo2", alpha=0.25), LONG),
        Setting("TDPO2, alpha 0.5", make("tdpo2", alpha=0.5)),
        Setting("DPO, lr 1.2e-4", make("dpo"), (50, 100, 150, 200), learning_rate=1.2e-4, tuned=True),
        Setting("DPO, beta 1", make("dpo", beta=1.0), tuned=True),
    ]


class Measure(TrainerCallback):  # type: ignore[misc]
    """Measures the policy after some steps."""

    def __init__(self, world: World, base: PreTrainedModel, run: Run, steps: Sequence[int]) -> None:
        self.world, self.base, self.run, self.steps = world, base, run, set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if state.global_step in self.steps:
            found = self.world.measure(model, self.base, seed=1000 + self.run.seed)
            self.run.curve.append({"step": state.global_step, **asdict(found)})


def train(world: World, setting: Setting, seed: int) -> Run:
    """Train one line of the comparison with one seed, which draws the order of the pairs and the evaluation."""
    run, base = Run(setting.label, seed), world.base()
    run.curve.append({"step": 0, **asdict(world.measure(base, base, seed=1000 + seed))})
    args = arguments(world, max_steps=max(setting.steps), learning_rate=setting.learning_rate, seed=seed)
    trainer = PreferenceTrainer(
        world.base(),
        args=args,
        loss=setting.loss,
        train_dataset=world.pairs,
        processing_class=world.tokenizer(),
        callbacks=[Measure(world, base, run, setting.steps)],
    )
    trainer.train()
    # Every line is measured alike: accuracy of the log-ratios as in DPO, divergences as in TDPO.
    judge = PreferenceTrainer(
        trainer.model,
        ref_model=base,
        args=args,
        loss=["dpo", "tdpo1"],
        eval_dataset=world.held_out_pairs,
        processing_class=world.tokenizer(),
    )
    figures = judge.evaluate()
    names = ("rewards/accuracies", "seqkl/chosen", "seqkl/rejected", "entropy")
    run.held_out = {name: figures[f"eval_{name}"] for name in names}
    return run


def arguments(world: World, **given: Any) -> PreferenceConfig:
    """The settings all runs share."""
    return PreferenceConfig(
        output_dir=str(world.folder / "_run"),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        warmup_steps=10,
        lr_scheduler_type="constant_with_warmup",
        activation_checkpointing=False,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        reference={"store": str(world.folder / "_store")},
        resume="never",
        **given,
    )


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of what is there."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{fmean(known):.2f}" + (f" +- {stdev(known):.2f}" if len(known) > 1 else "")


def table(runs: Sequence[Run]) -> str:
    """Every line of the comparison: at equal KL, at the end, and on held-out pairs."""
    head = (
        "loss",
        "seeds",
        f"reward at KL {KL:g}",
        "judge",
        f"step {LAST}: reward",
        "KL",
        "distinct-2",
        "accuracy",
        "entropy",
    )
    lines = [(*head, "SeqKL chosen", "rejected")]
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        figures = [spread([run.at(name) for run in own]) for name in ("reward", "judge")]
        figures += [spread([run.end(name) for run in own]) for name in ("reward", "kl", "distinct")]
        figures += [
            spread([run.held_out.get(name) for run in own])
            for name in ("rewards/accuracies", "entropy", "seqkl/chosen", "seqkl/rejected")
        ]
        lines.append((label, str(len(own)), *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def verdicts(runs: Sequence[Run]) -> list[str]:
    """What was to be shown, with the figure, and whether it was seen."""

    def of(label: str) -> dict[int, Run]:
        return {run.seed: run for run in runs if run.label == label}

    dpo, quarter, half, one = (of(name) for name in ("DPO", "TDPO2, alpha 0.25", "TDPO2, alpha 0.5", "TDPO1"))
    both = [(quarter[seed].at("reward"), dpo[seed].at("reward")) for seed in dpo.keys() & quarter.keys()]
    gaps = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
    lines = []
    if gaps:
        lines.append(
            _said(f"TDPO2 (0.25) earns {spread(gaps)} more than DPO at KL {KL:g}; 0.08 wanted", fmean(gaps) > 0.08)
        )
    else:
        lines.append(f"not shown: no pair of runs passed KL {KL:g}, so rewards cannot be compared there")
    if half:
        kl = [(half[seed].end("kl"), dpo[seed].end("kl")) for seed in dpo.keys() & half.keys()]
        share = fmean(ours / theirs for ours, theirs in kl)
        lines.append(_said(f"TDPO2 (0.5) ends with {share:.2f} of DPO's KL; under 0.5 wanted", share < 0.5))
    if one:
        gap = {
            name: fmean(run.held_out["seqkl/rejected"] - run.held_out["seqkl/chosen"] for run in line.values())
            for name, line in {"DPO": dpo, "TDPO1": one}.items()
        }
        text = f"SeqKL, rejected less chosen: {gap['TDPO1']:+.2f} with TDPO1, {gap['DPO']:+.2f} with DPO"
        lines.append(_said(f"{text}; under a quarter of DPO's wanted", gap["TDPO1"] < gap["DPO"] / 4))
    return lines


def _said(text: str, seen: bool) -> str:
    return f"{'seen' if seen else 'NOT seen'}: {text}"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Reward against KL, a line for each run; nothing without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('No plot was drawn: pip install "prefopt[report]"')
        return
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for number, label in enumerate(dict.fromkeys(run.label for run in runs)):
        tuned = label in {setting.label for setting in settings() if setting.tuned}
        for run in (run for run in runs if run.label == label):
            points = sorted((point["kl"], point["reward"]) for point in run.curve)
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color=f"C{number}",
                linestyle="--" if tuned else "-",
                label=label if run.seed == 0 else None,
            )
    axes.axvline(KL, color="grey", linewidth=0.8)
    axes.set(xlabel="KL(policy || base), nats an answer", ylabel="reward", xlim=(0, None))
    axes.set_title("Reward against divergence; dashed: DPO tuned by hand")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plot: {path}")


def main() -> None:
    """Make the world, train every line, print the table and what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with reviews_pos.txt and reviews_neg.txt")
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="labels of the lines to train")
    parser.add_argument("--steps", type=int, default=max(LONG), help="no run goes beyond this step")
    parser.add_argument("--quick", action="store_true", help="everything tiny: to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    size = TINY if options.quick else REVIEWS if options.data else GRAMMAR
    world = make_world(options.output, options.data, size)
    print(
        f"{len(world.pairs):,} pairs, {len(world.held_out_pairs)} held out; {len(world.prompts)} prompts to evaluate on"
    )
    runs: list[Run] = []
    for seed in range(options.seeds):
        for setting in settings():
            if options.only and setting.label not in options.only:
                continue
            if setting.tuned and seed > 1:
                continue
            steps = (2, 4) if options.quick else tuple(step for step in setting.steps if step <= options.steps)
            runs.append(train(world, Setting(setting.label, setting.loss, steps, setting.learning_rate), seed))
            (options.output / "frontier.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
            curve = ", ".join(f"{point['reward']:.2f} at {point['kl']:.2f}" for point in runs[-1].curve)
            print(f"{setting.label}, seed {seed}: reward {curve} nats")
    print(table(runs))
    print("\n".join(verdicts(runs)))
    plot(runs, options.output / "frontier.png")


if __name__ == "__main__":
    main()
