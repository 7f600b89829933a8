"""Pairs are ordered by the reward, and the KL is that of the distributions."""

from __future__ import annotations

import copy

import pytest
import torch

from prefopt.generation import Generation, encode_prompts
from prefopt.scratch import build_model, train_tokenizer
from prefopt.world import sampling
from prefopt.world.grammar import all_prompts
from prefopt.world.reward import reward
from prefopt.world.sampling import answer_kl, measure, sample_pairs

PROMPTS = all_prompts()[:6]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS, 300)


@pytest.fixture
def base(tokenizer):
    return build_model(LLAMA, tokenizer, seed=0)


@pytest.fixture
def policy(base):
    """The base with all weights moved."""
    moved = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return moved


def answers_of(texts_by_prompt, unfinished=()):
    """What `generate` would give for fixed texts."""
    return [
        Generation(index, text, [1, 2], finished=text not in unfinished)
        for index, texts in enumerate(texts_by_prompt)
        for text in texts
    ]


def pairs_of(monkeypatch, texts_by_prompt, unfinished=(), **options):
    monkeypatch.setattr(sampling, "generate", lambda *args, **kwargs: answers_of(texts_by_prompt, unfinished))
    prompts = PROMPTS[: len(texts_by_prompt)]
    return sample_pairs(None, None, prompts, lambda prompt, text: float(len(text)), **options)


def test_best_against_worst(monkeypatch):
    found = pairs_of(monkeypatch, [["aaa", "a", "aaaa", "aa"]])
    row = {"prompt": PROMPTS[0], "chosen": "aaaa", "rejected": "a", "score_chosen": 4.0, "score_rejected": 1.0}
    assert found.rows == [row]


def test_more_pairs_come_widest_first(monkeypatch):
    found = pairs_of(monkeypatch, [["a", "aaa", "aaaa"]], pairs_per_prompt=5)
    assert [(len(row["chosen"]), len(row["rejected"])) for row in found.rows] == [(4, 1), (3, 1), (4, 3)]


def test_ties_and_equal_answers_give_no_pair_and_are_counted(monkeypatch):
    found = pairs_of(monkeypatch, [["ab", "cd"], ["aa", "aa"], ["a", "bb", "bb"]], pairs_per_prompt=5)
    assert found.ties == 2
    assert [(row["chosen"], row["rejected"]) for row in found.rows] == [("bb", "a")]


def test_unusable_answers_take_no_part_and_are_counted(monkeypatch):
    found = pairs_of(monkeypatch, [["a", "aa", "aaa", "", "    ", "aaaaa\x00"]], unfinished=["aaa"])
    assert found.unusable == 4
    assert found.rows[0]["chosen"] == "aa"


def test_sampled_pairs_follow_the_seed_and_the_reward(base, tokenizer):
    def length(prompt: str, answer: str) -> float:
        return float(len(answer))

    base.generation_config.eos_token_id = list(range(3, 60))  # many end markers, so random answers end
    first, again, other = (
        sample_pairs(base, tokenizer, PROMPTS, length, max_new_tokens=30, seed=seed).rows for seed in (1, 1, 2)
    )
    assert first and first == again != other
    assert all(row["score_chosen"] == len(row["chosen"]) > row["score_rejected"] for row in first)


def test_a_policy_has_no_kl_to_itself(base, tokenizer):
    found = measure(base, base, tokenizer, PROMPTS, reward, max_new_tokens=8)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.length <= 8
    assert len(found.samples) == len(PROMPTS)


def test_kl_is_that_of_the_full_distributions(base, policy, tokenizer):
    prompts = encode_prompts(tokenizer, PROMPTS)
    answers = [Generation(index, "", list(range(5, 8 + index)), finished=True) for index in range(3)]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=False):
        ids = torch.tensor([prompt + answer.token_ids])
        log_p, log_q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, base))
        expected.append((log_p.exp() * (log_p - log_q)).sum().item())
    assert min(expected) > 0.01
    assert answer_kl(policy, base, prompts, answers, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_measurement_is_reproducible_and_leaves_modes_alone(base, policy, tokenizer):
    policy.train()
    first, again = (measure(policy, base, tokenizer, PROMPTS, reward, max_new_tokens=8, seed=3) for _ in range(2))
    assert first == again
    assert first.kl > 0.01
    assert policy.training


def test_measured_figures_are_means_over_the_samples(base, policy, tokenizer):
    found = measure(policy, base, tokenizer, PROMPTS, lambda prompt, text: float(len(text)), max_new_tokens=8)
    rewards = torch.tensor([sample["reward"] for sample in found.samples])
    assert found.reward == pytest.approx(rewards.mean().item())
    assert found.reward_se == pytest.approx(rewards.std().item() / len(rewards) ** 0.5)
    assert found.valid == 0.0
