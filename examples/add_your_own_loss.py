"""A loss of your own: one class, registered, and from then on like any other.

    python examples/add_your_own_loss.py                    # by hand, then in a trainer
    prefopt losses squared_hinge --plugin examples/add_your_own_loss.py
    prefopt train dpo --plugin examples/add_your_own_loss.py --loss.name squared_hinge ...

The rules a loss keeps are in prefopt/losses/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.losses import Loss, LossOutput, Needs, Pairs, knob, make, register
from prefopt.losses.functional import pair_metrics
from prefopt.scoring import TokenScores
from prefopt.scratch import build_model, train_tokenizer


@register("squared_hinge")
@dataclass(frozen=True)
class SquaredHinge(Loss):
    """Squared hinge on DPO's margin (source: this example, after the L2 loss of support vector machines).

    Pushes the scaled margin up to 1 and then leaves the pair alone, so easy pairs stop pulling.
    """

    beta: float = knob(0.1, above=0, help="strength of the pull to the reference")
    needs = Needs(view="pairs", reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        a, b = self.beta * view.chosen.log_ratio(), self.beta * view.rejected.log_ratio()
        return LossOutput(torch.relu(1 - (a - b)) ** 2, self.unit, pair_metrics(view, a, b))


def main() -> None:
    """Call the loss on numbers, then train with it."""
    tokens = torch.tensor([0, 0])  # one answer of two tokens on each side
    chosen = TokenScores(1, tokens, torch.tensor([-1.0, -2.0]), ref_logp=torch.tensor([-2.0, -3.0]))
    rejected = TokenScores(1, tokens, torch.tensor([-3.0, -4.0]), ref_logp=torch.tensor([-3.0, -3.0]))
    print("by hand:", make("squared_hinge", beta=0.1)(Pairs(chosen, rejected)).loss)  # (1 - 0.1 * (2 - -1)) ** 2

    rows = [{"prompt": f"{n} and {n}", "chosen": f" make {2 * n}.", "rejected": " make a mess."} for n in range(40)]
    tokenizer = train_tokenizer((text for row in rows for text in row.values()), vocab_size=300)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model({"model_type": "llama", **shape}, tokenizer, seed=0)
    args = PreferenceConfig("runs/own_loss", learning_rate=3e-3, save_strategy="no", logging_steps=5)
    trainer = PreferenceTrainer(model, None, args, "squared_hinge", train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    print("after training:", trainer.evaluate(rows)["eval_loss"])


if __name__ == "__main__":
    main()
