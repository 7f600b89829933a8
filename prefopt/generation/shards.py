"""Answers on disk: `shard-00000.jsonl`, ... and a manifest that says what made them.

A shard is a fixed stretch of the answers, whoever samples it, and is put in place whole. So any number of processes
share the work, a run that was killed goes on at the first shard that is missing, and the files are the same to the byte
in both cases (on equal hardware, with equal settings). The manifest is written before the first shard, and once more,
with the hash of every shard, when all of them are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.drift import differences, refuse_drift
from prefopt.errors import UserError
from prefopt.generation.prompts import Prompt, encode_prompts, messages_or_text
from prefopt.generation.sampling import Draw, Generation, Sampling, check_room, plan_draws, sample
from prefopt.generation.vllm_engine import VLLM
from prefopt.ranks import on_main, wait_for_files
from prefopt.reference.hashing import hash_json
from prefopt.reference.identity import identify
from prefopt.report.results import write_whole

MANIFEST = "manifest.json"


def generate_to_disk(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    folder: str | Path,
    sampling: Sampling | None = None,
    *,
    batch_size: int = 64,
    shard_size: int = 1024,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    vllm: VLLM | None = None,
) -> dict[str, Any]:
    """Sample answers to `prompts` into `folder`, and return its finished manifest; what is there already is kept.

    Under `accelerate launch` every process calls this, with the same arguments, a whole model and a folder that all
    see; process r of n samples shards r, r + n, ... `shard_size` and `batch_size` count answers. A record holds
    `prompt_index`, `prompt`, `text`, `finished`, `tokens` (the end marker included), and `model`, the SHA-256 of the
    weights that made it. `vllm` samples in the model's place, and takes a whole shard at once.

    Raises `UserError` for a folder with answers of another model, other prompts or other settings, and what `generate`
    raises.
    """
    folder, sampling, state = Path(folder), sampling or Sampling(), PartialState()
    if vllm is None:
        model.to(state.device)
    encoded = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    draws = plan_draws(encoded, sampling)
    check_room(model, draws, sampling)  # of the last shard as well, before the first
    parts = [draws[start : start + shard_size] for start in range(0, len(draws), shard_size)]
    identity = identify(model)
    facts = {
        **asdict(sampling),
        "sampled_by": "transformers" if vllm is None else "vllm",
        "batch_size": batch_size,
        "shard_size": shard_size,
        "prompts": hash_json(encoded),
        "tokenizer": hash_json(tokenizer.get_vocab()),
        "model": {"key": identity.key, "weights": identity.weights},
    }
    missing = on_main(lambda: _begin(folder, facts, len(parts)))
    own = [number for number in range(len(parts))[state.process_index :: state.num_processes] if number in missing]
    with tqdm(
        total=sum(len(parts[number]) for number in own),
        desc="Sampling",
        unit="answer",
        disable=None if state.is_main_process else True,
    ) as bar:
        for number in own:
            if vllm is None:
                answers = sample(model, tokenizer, parts[number], sampling, batch_size=batch_size, sampled=bar.update)
            else:
                answers = vllm.sample(parts[number], sampling, sampled=bar.update)
            _write_shard(folder, number, prompts, parts[number], answers, identity.weights)
    wait_for_files(folder / shard_name(number) for number in range(len(parts)))
    return on_main(lambda: _finish(folder, facts, len(parts)))


def read_generations(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a folder, ordered by prompt.

    Raises `UserError` where sampling is not finished, a shard is not as it was written, or a record is another model's.
    """
    folder = Path(folder)
    for name, digest in _finished(folder)["shards"].items():
        text = _shard_text(folder / name)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise UserError(f"{folder / name}: is not as it was written. Delete {folder} to sample its answers again")
        yield from map(json.loads, text.splitlines())


def model_of(folder: str | Path) -> str:
    """The SHA-256 of the weights that made the answers in a folder."""
    manifest = _read_manifest(Path(folder))
    if manifest is None:
        raise UserError(f"{folder}: there are no answers")
    return str(manifest["facts"]["model"]["weights"])


def content_of(folder: str | Path) -> str:
    """A hash of the answers in a folder. Raises `UserError` where sampling is not finished."""
    return hash_json(_finished(Path(folder))["shards"])


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.jsonl"


def _begin(folder: Path, facts: dict[str, Any], count: int) -> set[int]:
    """The shards that are missing, after the manifest is written or compared."""
    manifest = _read_manifest(folder)
    if manifest is None:
        if any(folder.glob("shard-*.jsonl")):
            raise UserError(f"{folder}: holds answers without a manifest. Delete it, or choose another folder")
        _write_manifest(folder, {"facts": facts})
    else:
        refuse_drift(differences(manifest["facts"], facts), None, folder, "the answers")
    return {number for number in range(count) if not (folder / shard_name(number)).is_file()}


def _finish(folder: Path, facts: dict[str, Any], count: int) -> dict[str, Any]:
    """Count and hash every shard, and write so into the manifest."""
    shards, totals = {}, dict.fromkeys(("answers", "finished", "tokens"), 0)
    for name in map(shard_name, range(count)):
        text = _shard_text(folder / name)
        shards[name] = hashlib.sha256(text.encode()).hexdigest()
        for record in map(json.loads, text.splitlines()):
            if record["model"] != facts["model"]["weights"]:
                raise UserError(f"{folder / name}: holds an answer of another model. Delete {folder} to sample again")
            totals["answers"] += 1
            totals["finished"] += record["finished"]
            totals["tokens"] += record["tokens"]
    manifest = {"facts": facts, **totals, "shards": shards}
    _write_manifest(folder, manifest)
    return manifest


def _write_shard(
    folder: Path,
    number: int,
    prompts: Sequence[Prompt],
    draws: Sequence[Draw],
    answers: Sequence[Generation],
    weights: str,
) -> None:
    lines = [
        json.dumps(
            {
                "prompt_index": draw.prompt_index,
                "prompt": messages_or_text(prompts[draw.prompt_index]),
                "text": answer.text,
                "finished": answer.finished,
                "tokens": len(answer.token_ids),
                "model": weights,
            }
        )
        for draw, answer in zip(draws, answers, strict=True)
    ]
    write_whole(folder / shard_name(number), "".join(f"{line}\n" for line in lines))


def _shard_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Delete the folder to sample its answers again") from error


def _finished(folder: Path) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    if manifest is None or "shards" not in manifest:
        raise UserError(f"{folder}: sampling is not finished there. Run the stage that fills it again")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["facts"]["model"]["weights"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is damaged. Delete {folder} to sample its answers again") from error
    return dict(manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
