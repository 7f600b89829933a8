"""Scores and a loss without any trainer: hidden states in, log-probs per token, a DPO loss with its gradient out.

    python examples/score_without_a_trainer.py

This is all that a training loop of your own needs. `score_tokens` reads the hidden states of the scored positions alone
and never holds their logits over the whole vocabulary at once.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.losses import Pairs, make
from prefopt.scoring import TokenScores, score_tokens
from prefopt.scratch import build_model, train_tokenizer

PROMPT, CHOSEN, REJECTED = "The sky is", " blue and wide.", " a kind of fish."


def answer_logp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> torch.Tensor:
    """Log-probability of each token of the answer and of its end marker: [M]."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    hidden = model.base_model(torch.tensor([prompt_ids + answer_ids]))[0][0]
    source = hidden[len(prompt_ids) - 1 : -1]  # the state at position t - 1 predicts token t
    return score_tokens(source, model.get_output_embeddings().weight, torch.tensor(answer_ids))["logp"]


def main() -> None:
    """Score one pair under a policy and its reference, and take one step by hand."""
    tokenizer = train_tokenizer([PROMPT, CHOSEN, REJECTED], vocab_size=300)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = build_model({"model_type": "llama", **shape}, tokenizer, seed=0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    loss_of = make("dpo", beta=0.1)

    def side(answer: str) -> TokenScores:
        logp, ref_logp = (answer_logp(model, tokenizer, PROMPT, answer) for model in (policy, reference))
        return TokenScores(1, torch.zeros(len(logp), dtype=torch.int64), logp, ref_logp=ref_logp)

    for step in range(3):
        output = loss_of(Pairs(chosen=side(CHOSEN), rejected=side(REJECTED)))  # output.loss is [1]: one pair
        output.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {output.loss.item():.4f}, margin {output.metrics['rewards/margins'].item():+.4f}")


if __name__ == "__main__":
    main()
