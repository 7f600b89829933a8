"""Answers of a round with a judge's scores, on disk in the shards of the answers, and the pairs they make."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from prefopt.console import say
from prefopt.data.formats import Example
from prefopt.data.messages import is_answer
from prefopt.generation import read_generations
from prefopt.generation.shards import content_of
from prefopt.judges import Judge, judge_facts, open_judge
from prefopt.procedures.pairing import as_answer, pair_row, write_rows
from prefopt.ranks import on_main, wait_for_files
from prefopt.reference.hashing import hash_json

SCORES = "scores.jsonl"
CHUNK = 64
"""Prompts that are judged together: what is lost of the judging when a run is killed."""


def judge_answers(block: Mapping[str, Any], answers: Path, folder: Path, *, cut_off: bool = False) -> dict[str, float]:
    """Judge the answers in a folder and write `scores.jsonl`; every rank calls this and judges its share.

    Only answers that ended and hold text are judged; with `cut_off` also those that did not end. A line holds
    `prompt_index`, `answers`, `scores`, how many were `left_out`, and `by`, a hash of the judge's settings and of the
    answers. Chunks that are there already are kept. Returns figures: answers judged, their mean score, mean of the
    best, share of prompts without a difference. Raises `UserError` where a judgement cannot be had.
    """
    state, judged = PartialState(), [judge_facts(block), content_of(answers)]
    by = hash_json([*judged, "cut off"] if cut_off else judged)[:16]
    if not on_main(lambda: _is_judged(folder / SCORES, by)):
        records = [list(group) for _, group in groupby(read_generations(answers), key=itemgetter("prompt_index"))]
        chunks = {
            folder / f"_{by}-{start // CHUNK:05d}.jsonl": records[start : start + CHUNK]
            for start in range(0, len(records), CHUNK)
        }
        missing = on_main(lambda: [path for path in chunks if not path.is_file()])
        own = {path: chunks[path] for path in missing[state.process_index :: state.num_processes]}
        cost = _judge_chunks(block, own, by, cut_off=cut_off)
        wait_for_files(chunks)
        costs = gather_object([cost])
        for rank, line in enumerate(costs):
            if line:
                say(f"judge{f', process {rank}' if len(costs) > 1 else ''}: {line}")
        on_main(lambda: _together(list(chunks), folder / SCORES))
    return on_main(lambda: _figures(folder / SCORES))


def best_against_worst(
    examples: Sequence[Example], folder: Path, *, sample_targets: bool
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Pairs of the best and the worst answer to each prompt, with `score_chosen` and `score_rejected`; and counts.

    `sample_targets`: with a column `target`, the first of the answers, which is a plain sample of the reference.
    """
    counts: Counter[str] = Counter()
    rows = []
    for line in _lines(folder / SCORES):
        counts["not judged: cut off, blank or no text"] += line["left_out"]
        ranked = sorted(zip(line["scores"], line["answers"], strict=True), key=lambda pair: pair[0])
        if len(ranked) < 2 or ranked[0][0] == ranked[-1][0] or ranked[0][1] == ranked[-1][1]:
            counts["prompts without a difference"] += 1
            continue
        (low, worst), (high, best) = ranked[0], ranked[-1]
        example = examples[line["prompt_index"]]
        target = {"target": as_answer(example, line["answers"][0])} if sample_targets else {}
        scores = {"score_chosen": high, "score_rejected": low}
        rows.append(pair_row(example, as_answer(example, best), as_answer(example, worst), **scores, **target))
    counts["pairs"] = len(rows)
    return rows, counts


def _is_judged(path: Path, by: str) -> bool:
    return path.is_file() and next(_lines(path))["by"] == by


def _judge_chunks(
    block: Mapping[str, Any], chunks: Mapping[Path, list[list[dict[str, Any]]]], by: str, *, cut_off: bool
) -> str:
    """Judge and write the chunks of this rank, and say what that has cost."""
    if not chunks:
        return ""
    judge, hidden = open_judge(block), None if PartialState().is_main_process else True
    for path, groups in tqdm(chunks.items(), desc="Judging", unit=f"x{CHUNK} prompts", disable=hidden):
        write_rows(path, [{**_judged(judge, records, cut_off=cut_off), "by": by} for records in groups])
    return judge.summary


def _judged(judge: Judge, records: Sequence[dict[str, Any]], *, cut_off: bool) -> dict[str, Any]:
    answers = [record["text"] for record in records if (cut_off or record["finished"]) and is_answer(record["text"])]
    return {
        "prompt_index": records[0]["prompt_index"],
        "answers": answers,
        "scores": judge.scores(records[0]["prompt"], answers) if answers else [],
        "left_out": len(records) - len(answers),
    }


def _together(parts: Sequence[Path], path: Path) -> None:
    """One file of all parts, which are then deleted."""
    write_rows(path, (line for part in parts for line in _lines(part)))
    for part in parts:
        part.unlink()


def _figures(path: Path) -> dict[str, float]:
    judged = [line["scores"] for line in _lines(path) if line["scores"]]
    if not judged:
        return {"judged": 0}
    return {
        "judged": sum(map(len, judged)),
        "score": fmean(score for scores in judged for score in scores),
        "best_score": fmean(map(max, judged)),
        "no_difference": fmean(max(scores) == min(scores) for scores in judged),
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
