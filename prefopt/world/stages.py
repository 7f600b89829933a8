"""The steps of the small world on disk: texts to learn from, pairs of a base model, and before against after."""

from __future__ import annotations

import json
import random
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.models import load_model, load_tokenizer
from prefopt.world.grammar import all_prompts, write_review
from prefopt.world.reward import reward
from prefopt.world.sampling import SampledPairs, measure, sample_pairs

HELD_OUT = 512
TEXTS, HELD_OUT_TEXTS, COMPARISON = "texts.jsonl", "held_out_texts.jsonl", "comparison.json"
PAIRS, EVAL_PAIRS = "pairs.jsonl", "eval_pairs.jsonl"


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of the small world; the defaults are those of the quickstart.

    `texts` reviews to learn from; `prompts` openings to make pairs on, with `samples_per_prompt` answers and at most
    `pairs_per_prompt` pairs each; `eval_prompts` openings, never seen in texts or pairs, to compare on, and
    `eval_pair_prompts` of the same kind for held-out pairs. Raises `UserError` for more openings than there are.
    """

    texts: int = 6000
    prompts: int = 1024
    samples_per_prompt: int = 4
    pairs_per_prompt: int = 1
    eval_prompts: int = 256
    eval_pair_prompts: int = 64
    max_new_tokens: int = 72
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"prompts": len(training_prompts()), "eval_prompts": HELD_OUT, "eval_pair_prompts": HELD_OUT}
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise UserError(f"{name} is {getattr(self, name)}; the small world has openings for 1 to {limit}")


def training_prompts() -> list[str]:
    """The openings texts and pairs are made on."""
    return all_prompts()[:-HELD_OUT]


def held_out_prompts() -> list[str]:
    """The openings kept for evaluation."""
    return all_prompts()[-HELD_OUT:]


def write_texts(path: Path, n: int, seed: int) -> None:
    """Write `n` reviews as JSON lines `{"prompt", "completion", "label": true}`, the same for the same seed."""
    rng = random.Random(seed)
    _write_reviews(path, rng.choices(training_prompts(), k=n), rng)


def write_held_out_texts(path: Path, n: int, seed: int) -> None:
    """Write reviews of the first `n` held-out openings, one each, in the form of `write_texts`."""
    _write_reviews(path, held_out_prompts()[:n], random.Random(f"held out {seed}"))


def make_texts(folder: Path, settings: WorldSettings) -> Path:
    """Write the reviews the base model learns from to `texts.jsonl` in `folder`, and held-out ones; the path.

    Those of held-out openings lie in `held_out_texts.jsonl`.
    """
    write_texts(folder / TEXTS, settings.texts, settings.seed)
    write_held_out_texts(folder / HELD_OUT_TEXTS, settings.eval_prompts, settings.seed)
    return folder / TEXTS


def make_pairs(model_dir: Path, folder: Path, settings: WorldSettings) -> dict[str, int]:
    """Sample pairs from the model in `model_dir` and write `pairs.jsonl` and `eval_pairs.jsonl` to `folder`.

    Returns how many pairs there are, how many prompts gave none because all answers earn the same, and how many
    answers could not be used: they never ended, or were blank.
    """
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))

    def sample(prompts: list[str], seed: int) -> SampledPairs:
        return sample_pairs(
            model,
            tokenizer,
            prompts,
            reward,
            samples_per_prompt=settings.samples_per_prompt,
            pairs_per_prompt=settings.pairs_per_prompt,
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
        )

    train = sample(training_prompts()[: settings.prompts], settings.seed + 1)
    held_out = sample(held_out_prompts()[-settings.eval_pair_prompts :], settings.seed + 2)
    _write_rows(folder / PAIRS, train.rows)
    _write_rows(folder / EVAL_PAIRS, held_out.rows)
    return {
        "pairs": len(train.rows),
        "eval_pairs": len(held_out.rows),
        "ties": train.ties + held_out.ties,
        "unusable": train.unusable + held_out.unusable,
    }


def compare(base_dir: Path, policy_dir: Path, folder: Path, settings: WorldSettings) -> dict[str, Any]:
    """Measure base and policy on held-out prompts with the true reward; also written to `comparison.json` in `folder`.

    Returns `{"before": ..., "after": ..., "reward_gain", "reward_gain_se"}`, where before and after hold the fields of
    `sampling.Measurement`, KL to the base included (0 before).
    """
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(base_dir))
    base, policy = load_model(str(base_dir)), load_model(str(policy_dir))
    prompts = held_out_prompts()[: settings.eval_prompts]
    before, after = (
        measure(model, base, tokenizer, prompts, reward, max_new_tokens=settings.max_new_tokens, seed=settings.seed + 3)
        for model in (base, policy)
    )
    result = {
        "before": asdict(before),
        "after": asdict(after),
        "reward_gain": after.reward - before.reward,
        "reward_gain_se": (before.reward_se**2 + after.reward_se**2) ** 0.5,
    }
    (folder / COMPARISON).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def comparison_text(result: dict[str, Any], *, samples: int = 3, width: int = 96) -> str:
    """The result of `compare` for a terminal: a table, then some answers to the same prompts before and after."""
    before, after = result["before"], result["after"]
    figures = [
        ("true reward", "reward", "+10.2f"),
        ("  standard error", "reward_se", "10.2f"),
        ("KL to the base model, nats", "kl", "10.2f"),
        ("length, tokens", "length", "10.1f"),
        ("ended by itself", "finished", "10.0%"),
        ("grammatical", "valid", "10.0%"),
    ]
    lines = [f"{'':28}{'before':>10}{'after':>10}"]
    lines += [f"{label:28}{before[name]:{form}}{after[name]:{form}}" for label, name, form in figures]
    lines += [f"{'gain in true reward':28}{result['reward_gain']:>+20.2f} +- {result['reward_gain_se']:.2f}"]
    for old, new in list(zip(before["samples"], after["samples"], strict=True))[:samples]:
        lines += ["", old["prompt"], *_answer_lines("before", old, width), *_answer_lines("after", new, width)]
    return "\n".join(lines)


def _answer_lines(label: str, sample: dict[str, Any], width: int) -> list[str]:
    head = f"  {label:<7}{sample['reward']:>+6.2f}  "
    lines = textwrap.wrap(sample["answer"], width, initial_indent=head, subsequent_indent=" " * len(head))
    return lines or [head]


def _write_reviews(path: Path, prompts: Iterable[str], rng: random.Random) -> None:
    reviews = ((prompt, write_review(prompt, rng)) for prompt in prompts)
    _write_rows(path, ({"prompt": prompt, "completion": review, "label": True} for prompt, review in reviews))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
