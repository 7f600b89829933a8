"""What is trained on: lengths of prompts and answers as real data has them, and rows of random tokens of such lengths.

Speed depends on lengths and not on words. Two profiles with long prompts and with long answers: `hh` (Anthropic HH,
counts in `hh_lengths.json`) and `judged` (conversations, `judged_pairs_train.jsonl`). Where the files are absent,
log-normal lengths of the same means stand in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data.sampler import WindowSampler

if TYPE_CHECKING:
    from prefopt.benchmark.setting import Options

MAX_LENGTH = 1024
_FILES = {"hh": "hh_lengths.json", "judged": "judged_pairs_train.jsonl"}
NAMES = tuple(_FILES)
# Mean tokens of prompt, chosen and rejected answer before the limit cuts them, and the standard deviation of their
# logarithms; chosen so that what is left has the means of the files.
_FITS = {"hh": ((130, 42, 54), (1.0, 0.88, 0.93)), "judged": ((40, 500, 240), (0.86, 0.6, 0.9))}
_SYNTHETIC_ROWS = 2000
_VOCABULARY = 8192
_FIRST_WORD = 3  # ids below are padding, end and unknown


@dataclass(frozen=True)
class Profile:
    """Token counts of pairs: `lengths` `[n, 3]` of prompt, chosen and rejected answer, and where they are from."""

    name: str
    source: str
    lengths: np.ndarray

    @property
    def read(self) -> np.ndarray:
        """Tokens of each pair in rows of their own: `2P + C + R`, `[n]`."""
        return self.lengths @ np.array([2, 1, 1])


def load(name: str, folder: Path, seed: int = 0) -> Profile:
    """The profile of this name, from its file in `folder` or, where there is none, made up."""
    path = folder / _FILES[name]
    if not path.is_file():
        return made_up(name, *_FITS[name], seed=seed)
    lengths = json.loads(path.read_text())["lengths"] if path.suffix == ".json" else list(_token_counts(path))
    return Profile(name, path.name, _cut(np.array(lengths)))


def profile_for(name: str, options: Options) -> Profile:
    """The profile under these options: in a hurry, its lengths are cut to a sixteenth."""
    profile = load(name, options.data, options.seed)
    return replace(profile, lengths=profile.lengths // 16 + 1) if options.quick else profile


def made_up(
    name: str, means: Sequence[float], spreads: Sequence[float], *, seed: int = 0, count: int = _SYNTHETIC_ROWS
) -> Profile:
    """Log-normal lengths of these means; `spreads` are the standard deviations of the logarithms."""
    mean, spread = np.array(means), np.array(spreads)
    drawn = np.random.default_rng(seed).normal(np.log(mean) - spread**2 / 2, spread, (count, 3))
    return Profile(name, "log-normal", _cut(np.exp(drawn).round().astype(np.int64)))


def _cut(lengths: np.ndarray) -> np.ndarray:
    """As a trainer cuts with its defaults: the end of the answer; the prompt leaves it one token at least."""
    prompt = lengths[:, :1].clip(1, MAX_LENGTH - 1)
    return np.hstack([prompt, lengths[:, 1:].clip(1, MAX_LENGTH - prompt)])


def _token_counts(path: Path) -> Iterator[tuple[int, int, int]]:
    """Token counts of conversational pairs under a byte-level BPE trained on them; the end token counts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = ["\n".join(m["content"] for m in row[side]) for row in rows for side in ("prompt", "chosen", "rejected")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False))
    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    for index in range(0, len(counts), 3):
        prompt, chosen, rejected = counts[index : index + 3]
        yield prompt, chosen + 1, rejected + 1


def windows(profile: Profile, *, batch_size: int, count: int, grouped: bool, seed: int = 0) -> list[np.ndarray]:
    """`count` steps' rows that stand for an epoch: rows of like length together (`grouped`), or any.

    Of the epoch's windows, sorted by the tokens a padded batch of them holds, one from each of `count` equal parts:
    the one nearest to its part's mean. So a few steps cost what the whole epoch does on average.
    """
    strategy = "group_by_length" if grouped else "random"
    sampler = WindowSampler(profile.read.tolist(), batch_size=batch_size, seed=seed, strategy=strategy, drop_last=True)
    longest = profile.lengths[:, 0] + profile.lengths[:, 1:].max(1)
    found = sampler.windows()
    tokens = np.array([2 * batch_size * longest[window].max() for window in found])
    parts = np.array_split(np.argsort(tokens, kind="stable"), count)
    return [found[part[np.abs(tokens[part] - tokens[part].mean()).argmin()]] for part in parts]


def steps_of(profile: Profile, options: Options, *, grouped: bool = True) -> np.ndarray:
    """The rows of the steps of one round, `[steps, pairs]`."""
    return np.stack(
        windows(profile, batch_size=options.batch_size, count=options.steps, grouped=grouped, seed=options.seed)
    )


def token_rows(lengths: np.ndarray, *, vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random tokens with these lengths `[n, 3]`, as a tokenised data set holds them."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(_FIRST_WORD, vocabulary, count)]

    rows = []
    for index, (prompt, chosen, rejected) in enumerate(lengths.tolist()):
        row: dict[str, Any] = {"row": index, "columns": {}, "prompt_ids": ids(prompt)}
        for side, count in (("chosen", chosen), ("rejected", rejected)):
            row |= {f"{side}_ids": ids(count), f"{side}_scored": [1] * count}
        rows.append(row)
    return rows
