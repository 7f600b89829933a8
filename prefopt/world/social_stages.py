"""The steps of the social world on disk: conversations to imitate, pairs of them, their segments, before and after."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prefopt.data.segments import SegmentReport, Selector, as_json_lines, build_segments
from prefopt.data.spec import DataSpec
from prefopt.errors import UserError
from prefopt.models import load_model, load_tokenizer
from prefopt.report.results import write_whole
from prefopt.world.social import DECIDING, expert_sessions, session_pairs
from prefopt.world.social_figures import as_dict, measure, session_row

SESSIONS, COMPARISON = "sessions.jsonl", "comparison.json"
PAIRS, EVAL_PAIRS = "pairs.jsonl", "eval_pairs.jsonl"
SEGMENTS, EVAL_SEGMENTS = "segments.jsonl", "eval_segments.jsonl"
_TRAINED, _HELD_OUT, _MEASURED = 100, 200, 300  # added to the seed: partners of their own


@dataclass(frozen=True)
class SocialSettings:
    """Sizes of the social world, and the seed of all that is drawn. Raises `UserError` for sizes below 1.

    `sessions`: conversations of the expert. `pairs`, `eval_pairs`: the most pairs to train and to evaluate on. `tries`:
    how often a failure is gone on with from before its first wrong turn, to find a sale. `partners`: new ones, to
    measure on.
    """

    sessions: int = 4000
    pairs: int = 800
    eval_pairs: int = 100
    tries: int = 5
    partners: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "seed"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


def make_sessions(folder: Path, settings: SocialSettings) -> Path:
    """Write the expert's conversations that the agent learns from to `sessions.jsonl` in `folder`; the path."""
    path = folder / SESSIONS
    rows = [session_row(session) for session in expert_sessions(settings.sessions, settings.seed)]
    write_whole(path, as_json_lines(rows))
    return path


def make_pairs(model_dir: Path, folder: Path, settings: SocialSettings) -> dict[str, int]:
    """Let the model in `model_dir` meet partners; write `pairs.jsonl` and `eval_pairs.jsonl` to `folder`.

    The pairs are whole conversations with the bounds of the turns that decided. Returns how many there are.
    """
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    wanted = ((PAIRS, settings.pairs, _TRAINED), (EVAL_PAIRS, settings.eval_pairs, _HELD_OUT))
    counts = {}
    for name, count, place in wanted:
        rows = session_pairs(model, tokenizer, count, settings.seed + place, settings.tries)
        write_whole(folder / name, as_json_lines(rows))
        counts[Path(name).stem] = len(rows)
    return counts


def make_segments(folder: Path, select: Selector) -> SegmentReport:
    """Cut the pairs in `folder` into `segments.jsonl` and `eval_segments.jsonl`; the report of the first."""
    reports = []
    for source, name in ((PAIRS, SEGMENTS), (EVAL_PAIRS, EVAL_SEGMENTS)):
        rows, report = build_segments(DataSpec(data_files=str(folder / source)), select)
        write_whole(folder / name, as_json_lines(rows))
        reports.append(report)
    return reports[0]


def compare(start_dir: Path, policy_dir: Path, folder: Path, settings: SocialSettings) -> dict[str, Any]:
    """Let both models meet the same new partners; also written to `comparison.json` in `folder`.

    Returns `{"before": ..., "after": ..., "gain", "gain_se"}`, where before and after hold the figures of
    `social_figures.Figures` and the conversations.
    """
    tokenizer = load_tokenizer(str(start_dir))
    start, policy = load_model(str(start_dir)), load_model(str(policy_dir))
    seed = settings.seed + _MEASURED
    before, after = (as_dict(*measure(model, start, tokenizer, settings.partners, seed)) for model in (start, policy))
    gain_se = (before["sales_se"] ** 2 + after["sales_se"] ** 2) ** 0.5
    result = {"before": before, "after": after, "gain": after["sales"] - before["sales"], "gain_se": gain_se}
    write_whole(folder / COMPARISON, json.dumps(result, indent=1) + "\n")
    return result


def comparison_text(result: dict[str, Any]) -> str:
    """The result of `compare` for a terminal: a table, then what decided one conversation before and after."""
    figures = [
        ("conversations that end in a sale", "sales", "10.1%"),
        ("  standard error", "sales_se", "10.1%"),
        ("KL to the start, nats a token", "kl", "10.4f"),
        ("  in the turns that decide", "key_kl", "10.4f"),
        ("  in small talk", "talk_kl", "10.4f"),
        ("turns in the expert's language", "language", "10.1%"),
        ("words a turn", "words", "10.1f"),
    ]
    before, after = result["before"], result["after"]
    lines = [f"{'':34}{'before':>10}{'after':>10}"]
    lines += [f"{label:34}{before[name]:{form}}{after[name]:{form}}" for label, name, form in figures]
    lines += [f"{'more sales':34}{result['gain']:>+20.1%} +- {result['gain_se']:.1%}"]
    for label, found in (("before", before), ("after", after)):
        lines += ["", *_session_lines(label, _telling(before, after, found))]
    return "\n".join(lines)


def _telling(before: dict[str, Any], after: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of the conversations in `found`, the first that was lost before and is a sale after; else the first of all."""
    pairs = zip(before["samples"], after["samples"], strict=True)
    place = next((place for place, (old, new) in enumerate(pairs) if new["sold"] > old["sold"]), 0)
    sample: dict[str, Any] = found["samples"][place]
    return sample


def _session_lines(label: str, sample: dict[str, Any]) -> list[str]:
    first, last = 2 * DECIDING[0], 2 * DECIDING[-1] + 1
    speaker = {"user": "partner", "assistant": "agent"}
    spoken = [f"  {speaker[each['role']]:8}{each['content']}" for each in sample["messages"][first : last + 1]]
    return [f"{label}: {'a sale' if sample['sold'] else 'no sale'}; the turns that decided it", *spoken]
