"""A world to compare losses in: short film reviews, a reward that is a sentiment classifier, a small base model.

With two files of labelled sentences (one a line) it is made of those; without them, of the embedded grammar, whose
reward is known. Everything is made once and kept in a folder: a tokenizer, a base model trained from scratch on the
texts, answers sampled from it, and pairs of the answers to one prompt, the better one by the reward chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.data.dataset import TokenDataset
from prefopt.data.messages import is_answer
from prefopt.generation import Generation, encode_prompts, generate
from prefopt.models import load_model, load_tokenizer
from prefopt.scratch import build_model, train_tokenizer
from prefopt.world.reward import reward as known_reward
from prefopt.world.sampling import answer_kl
from prefopt.world.stages import HELD_OUT, write_held_out_texts, write_texts

Judge = Callable[[str], float]

PROMPT_TOKENS = 6
SAMPLES = 4
_BUCKETS = 2**16
_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True)
class Size:
    """How much of everything.

    `epochs` of the base model over at most `texts`, `prompts` to make pairs on, `held_out` prompts and `held_out_pairs`
    to evaluate on, `new_tokens` of an answer at most.
    """

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    epochs: int = 6
    texts: int = 10_000
    prompts: int = 2560
    held_out: int = 512
    held_out_pairs: int = 1024
    new_tokens: int = 22


SMALL = Size(layers=2, epochs=4, prompts=800, held_out=256, held_out_pairs=512, new_tokens=32)
TINY = Size(
    vocabulary=512, width=16, layers=1, epochs=1, texts=400, prompts=40, held_out=24, held_out_pairs=16, new_tokens=8
)


@dataclass(frozen=True)
class Measured:
    """What a policy earns by both judges, and what it costs: KL(policy || base) of an answer, nats."""

    reward: float
    reward_se: float
    judge: float
    kl: float
    length: float
    distinct: float


@dataclass(frozen=True)
class World:
    """Base model and tokenizer, the two judges, texts, prompts to evaluate on, and pairs as token rows.

    `texts` are those the base model learnt, `held_out` those it did not.
    """

    folder: Path
    reward: Judge
    judge: Judge
    texts: Sequence[str]
    held_out: Sequence[str]
    prompts: Sequence[str]
    pairs: TokenDataset
    held_out_pairs: TokenDataset
    size: Size

    def base(self) -> PreTrainedModel:
        """A fresh copy of the base model."""
        return load_model(str(self.folder / "base"))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(str(self.folder / "base"))

    def measure(self, policy: PreTrainedModel, base: PreTrainedModel, seed: int) -> Measured:
        """One answer to each held-out prompt, judged, and its exact KL at each of its tokens."""
        tokenizer = self.tokenizer()
        answers = generate(
            policy, tokenizer, self.prompts, max_new_tokens=self.size.new_tokens, seed=seed, batch_size=256
        )
        kl = answer_kl(policy, base, encode_prompts(tokenizer, self.prompts), answers, batch_size=128)
        texts = [self.prompts[answer.prompt_index] + answer.text for answer in answers]
        rewards = [self.reward(text) for text in texts]
        return Measured(
            reward=fmean(rewards),
            reward_se=stdev(rewards) / len(rewards) ** 0.5,
            judge=fmean(self.judge(text) for text in texts),
            kl=fmean(kl),
            length=fmean(len(answer.token_ids) for answer in answers),
            distinct=distinct_2(answers),
        )


def make_world(folder: Path, data: Path | None, size: Size) -> World:
    """The world kept in `folder`, made there first if need be; `data` holds `reviews_pos.txt` and `reviews_neg.txt`."""
    texts, held_out, reward, judge = real(data) if is_real(data) else _embedded(folder)
    texts = texts[: size.texts]
    if not (folder / "base" / "config.json").exists():
        _train_base(folder, texts, size)
    tokenizer = load_tokenizer(str(folder / "base"))
    prompts = _prompts(tokenizer, texts)[: size.prompts]
    evaluation = _prompts(tokenizer, held_out)
    answers = _cached(folder / "answers.json", lambda: _sample(folder, prompts, size, seed=1))
    fresh = _cached(folder / "held_out_answers.json", lambda: _sample(folder, evaluation, size, seed=2))
    return World(
        folder,
        reward,
        judge,
        texts,
        held_out,
        evaluation[: size.held_out],
        _pairs(tokenizer, prompts, answers, reward),
        _pairs(tokenizer, evaluation, fresh, reward, limit=size.held_out_pairs),
        size,
    )


def answer_rows(world: World, texts: Sequence[str]) -> list[dict[str, str]]:
    """Texts as rows of answers: the first tokens of each are the prompt, the rest is the answer."""
    tokenizer = world.tokenizer()
    cut = {text: next(iter(_prompts(tokenizer, [text])), "") for text in texts}
    return [
        {"prompt": prompt, "completion": text.removeprefix(prompt)}
        for text, prompt in cut.items()
        if prompt and text.startswith(prompt)
    ]


def pair_rows(world: World) -> list[dict[str, Any]]:
    """The pairs of `world.pairs` as rows of text, without those that no file of data may hold."""
    prompts = _prompts(world.tokenizer(), world.texts)
    answers = json.loads((world.folder / "answers.json").read_text(encoding="utf-8"))
    end = world.tokenizer().eos_token_id
    groups: dict[str, list[tuple[float, str, bool]]] = {}
    for answer in answers:
        prompt, text = prompts[answer["prompt"]], answer["text"]
        groups.setdefault(prompt, []).append((world.reward(prompt + text), text, answer["ids"][-1] == end))
    return [
        _text_row(prompt, *pair)
        for prompt, scored in groups.items()
        for pair in combinations(sorted(scored, reverse=True), 2)
        if pair[0][0] > pair[1][0] and all(is_answer(text) for _, text, _ in pair)
    ]


def _text_row(prompt: str, high: tuple[float, str, bool], low: tuple[float, str, bool]) -> dict[str, Any]:
    sides = {"chosen": high, "rejected": low}
    unfinished = [side for side, (_, _, ended) in sides.items() if not ended]
    return {"prompt": prompt, **{side: text for side, (_, text, _) in sides.items()}, "unfinished": unfinished}


def accuracy(world: World, policy: PreTrainedModel, base: PreTrainedModel) -> float:
    """The share of held-out pairs whose kinder answer has gained more on the base model."""
    args = PreferenceConfig(
        output_dir=str(world.folder / "_accuracy"),
        per_device_eval_batch_size=64,
        reference={"store": str(world.folder / "_store")},
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PreferenceTrainer(
        policy,
        ref_model=base,
        args=args,
        loss="dpo",
        eval_dataset=world.held_out_pairs,
        processing_class=world.tokenizer(),
    )
    return float(trainer.evaluate()["eval_rewards/accuracies"])


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def distinct_2(answers: Sequence[Generation]) -> float:
    """Share of different pairs of neighbouring tokens among all of them."""
    pairs = [pair for answer in answers for pair in pairwise(answer.token_ids)]
    return len(set(pairs)) / max(1, len(pairs))


def classifier(texts: Sequence[str], labels: Sequence[bool], l2: float = 1e-4) -> Judge:
    """Logistic regression on words and pairs of words, weighted by how rare they are; its logit is the score."""
    features = [_features(text) for text in texts]
    counts = torch.bincount(torch.cat(features), minlength=_BUCKETS)
    rarity = torch.log(len(texts) / (1.0 + counts)).clamp(min=0)
    weight = nn.Parameter(torch.zeros(_BUCKETS))
    bias = nn.Parameter(torch.zeros(()))
    flat, owner = torch.cat(features), torch.repeat_interleave(torch.tensor([len(part) for part in features]))
    values = rarity[flat]
    norm = torch.zeros(len(texts)).index_add(0, owner, values**2).sqrt().clamp(min=1e-6)
    values = values / norm[owner]
    wanted = torch.tensor(labels, dtype=torch.float32)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.zeros(len(texts)).index_add(0, owner, values * weight[flat]) + bias
        value = nn.functional.binary_cross_entropy_with_logits(scores, wanted) + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    table, offset = (weight.detach() * rarity).numpy(), float(bias.detach())
    rare = rarity.numpy()

    def score(text: str) -> float:
        found = _features(text).numpy()
        return float(table[found].sum() / max(1e-6, np.linalg.norm(rare[found])) + offset)

    return score


def calibrated(judge: Judge, labelled: Sequence[tuple[str, bool]]) -> Judge:
    """The judge with its logit scaled so that it is right as often as it says, on texts it has not seen."""
    scores = torch.tensor([judge(text) for text, _ in labelled])
    wanted = torch.tensor([label for _, label in labelled], dtype=torch.float32)
    scales = torch.logspace(-1, 2, 301)
    losses = nn.functional.binary_cross_entropy_with_logits(
        scales[:, None] * scores, wanted.expand(len(scales), -1), reduction="none"
    )
    scale = float(scales[losses.mean(1).argmin()])
    return lambda text: scale * judge(text)


def _features(text: str) -> Tensor:
    words = _WORD.findall(text.lower())
    terms = [*words, *(f"{left} {right}" for left, right in pairwise(words))]
    return torch.tensor([_bucket(term) for term in terms], dtype=torch.int64)


def _bucket(term: str) -> int:
    value = 0
    for byte in term.encode():
        value = (value * 257 + byte) % 2_147_483_647
    return value % _BUCKETS


def known(text: str) -> float:
    """The reward of the embedded world."""
    return known_reward("", text)


def is_real(data: Path | None) -> TypeGuard[Path]:
    """Whether a folder holds the two files of labelled sentences."""
    return data is not None and (data / "reviews_pos.txt").exists()


def real(data: Path) -> tuple[list[str], list[str], Judge, Judge]:
    """Training and held-out sentences, the reward from one half of the training sentences, a judge from the other."""
    positive, negative = data / "reviews_pos.txt", data / "reviews_neg.txt"
    labelled = [(line, path is positive) for path in (positive, negative) for line in _lines(path)]
    order = np.random.default_rng(0).permutation(len(labelled))
    labelled = [labelled[index] for index in order]
    held_out, train = labelled[: len(labelled) // 10], labelled[len(labelled) // 10 :]
    judges = [calibrated(classifier(*zip(*train[half::2], strict=True)), train[1 - half :: 2]) for half in (0, 1)]
    for name, judge in zip(("reward", "judge"), judges, strict=True):
        right = fmean((judge(text) > 0) == label for text, label in held_out)
        print(f"{name}: {right:.1%} of {len(held_out)} held-out sentences right")
    return [text for text, _ in train], [text for text, _ in held_out], judges[0], judges[1]


def _embedded(folder: Path) -> tuple[list[str], list[str], Judge, Judge]:
    """The grammar's own reviews; the reward is known, so it is its own judge."""
    path = folder / "texts.jsonl"
    write_texts(path, 6000, seed=0)
    texts = _texts(path)
    write_held_out_texts(folder / "held_out_texts.jsonl", HELD_OUT, seed=0)
    held_out = _texts(folder / "held_out_texts.jsonl")
    return texts, held_out, known, known


def _texts(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row["prompt"] + row["completion"] for row in rows]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _train_base(folder: Path, texts: Sequence[str], size: Size) -> None:
    tokenizer = train_tokenizer(texts, size.vocabulary)
    fields = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    model = build_model(fields, tokenizer, seed=0)
    args = PreferenceConfig(
        output_dir=str(folder / "_base"),
        num_train_epochs=size.epochs,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_length=128,
        activation_checkpointing=False,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"prompt": "", "completion": text, "label": True} for text in texts]
    trainer = PreferenceTrainer(model, args=args, loss="sft", train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def _prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The first tokens of each text, where they are read again as the same tokens."""
    found: dict[str, None] = {}
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        text = tokenizer.decode(ids[:PROMPT_TOKENS])
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > PROMPT_TOKENS and again == ids[:PROMPT_TOKENS]:
            found[text] = None
    return list(found)


def _cached(path: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if not path.exists():
        path.write_text(json.dumps(make()), encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _sample(folder: Path, prompts: Sequence[str], size: Size, seed: int) -> list[dict[str, Any]]:
    model, tokenizer = load_model(str(folder / "base")), load_tokenizer(str(folder / "base"))
    answers = generate(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=SAMPLES,
        max_new_tokens=size.new_tokens,
        seed=seed,
        batch_size=256,
    )
    return [{"prompt": answer.prompt_index, "text": answer.text, "ids": answer.token_ids} for answer in answers]


def _pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[dict[str, Any]],
    reward: Judge,
    limit: int | None = None,
) -> TokenDataset:
    """All pairs of the answers to each prompt, `limit` in all, as token rows: an answer that never ended gets no end.

    All pairs, and not the widest: the worst answers of a prompt are longer than its best.
    """
    encoded = encode_prompts(tokenizer, prompts)
    groups: dict[int, list[tuple[float, list[int]]]] = {}
    for answer in answers:
        score = reward(prompts[answer["prompt"]] + answer["text"])
        groups.setdefault(answer["prompt"], []).append((score, answer["ids"]))
    rows: list[dict[str, Any]] = []
    for index, scored in groups.items():
        for (high, chosen), (low, rejected) in combinations(sorted(scored, reverse=True), 2):
            if high > low:
                rows.append(_row(encoded[index], chosen, rejected, len(rows)))
    return TokenDataset(rows[:limit])


def _row(prompt: list[int], chosen: list[int], rejected: list[int], row: int) -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt_ids": np.asarray(prompt, np.int32),
        **{f"{side}_ids": np.asarray(ids, np.int32) for side, ids in sides.items()},
        **{f"{side}_scored": np.ones(len(ids), bool) for side, ids in sides.items()},
        "columns": {},
        "row": row,
    }
