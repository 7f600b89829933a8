"""What people get wrong in a recipe, and the exact answer. The table is tested, and shown in the documentation."""

from __future__ import annotations

from typing import NamedTuple

BASE = """\
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
data_files: [pairs.jsonl]
loss:
  name: dpo
  beta: 0.1
learning_rate: 5e-6
max_length: 1024
"""


class Mistake(NamedTuple):
    """A change to the recipe above (`new` in place of `old`, or at its end) or options, and what is answered."""

    title: str
    answer: str
    new: str = ""
    old: str = ""
    options: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        """The recipe with the mistake in it."""
        assert self.old in BASE
        return BASE.replace(self.old, self.new) if self.old else f"{BASE}{self.new}\n"


def mistake_table() -> list[Mistake]:
    """Every mistake, in the order of the documentation."""
    return [
        Mistake(
            "misspelt setting",
            "recipe.yaml:8: lerning_rate: there is no such setting. Did you mean `learning_rate`?",
            "lerning_rate: 1e-6",
        ),
        Mistake(
            "setting written twice",
            "recipe.yaml:8: learning_rate: written twice, first on line 6. Keep one.",
            "learning_rate: 1e-6",
        ),
        Mistake(
            "misspelt knob",
            "recipe.yaml:5: loss.betta: `dpo` does not read it. Did you mean `beta`? Its knobs: beta.",
            "betta: 0.1",
            "beta: 0.1",
        ),
        Mistake(
            "knob outside the loss block",
            "recipe.yaml:8: beta: a knob of the loss. Write loss.beta, that is `beta: 0.2` under `loss:`.",
            "beta: 0.2",
        ),
        Mistake("knob as an option", "--beta: a knob of the loss. Write --loss.beta 0.2.", options=("--beta", "0.2")),
        Mistake("TRL's loss_type", "recipe.yaml:8: loss_type: write loss: {name: dpo}.", "loss_type: sigmoid"),
        Mistake(
            "name of an older transformers",
            "recipe.yaml:8: warmup_ratio: write warmup_steps: 0.1. A value below 1 is a share of all steps.",
            "warmup_ratio: 0.1",
        ),
        Mistake(
            "name of an older TRL",
            "recipe.yaml:8: max_prompt_length: write max_length: 512. It counts prompt and answer together.",
            "max_prompt_length: 512",
        ),
        Mistake("torch_dtype", "recipe.yaml:8: torch_dtype: write dtype: bfloat16.", "torch_dtype: bfloat16"),
        Mistake(
            "out of range",
            "recipe.yaml:6: learning_rate: must be at least 0, not -1.",
            "learning_rate: -1",
            "learning_rate: 5e-6",
        ),
        Mistake(
            "not a number",
            "recipe.yaml:6: learning_rate: must be a finite number, not `.nan`.",
            "learning_rate: .nan",
            "learning_rate: 5e-6",
        ),
        Mistake(
            "knob out of range",
            "recipe.yaml:5: loss.beta: `dpo` takes a number above 0, not 0.",
            "beta: 0",
            "beta: 0.1",
        ),
        Mistake(
            "underscore in a number",
            "recipe.yaml:7: max_length: `1_024` has an underscore. Write 1024.",
            "max_length: 1_024",
            "max_length: 1024",
        ),
        Mistake(
            "text for true or false",
            'recipe.yaml:8: bf16: expected true or false, got the text "false".',
            'bf16: "false"',
        ),
        Mistake(
            "true for a number",
            "recipe.yaml:8: logging_steps: expected a number, got `true`.",
            "logging_steps: true",
        ),
        Mistake(
            "unknown choice",
            "recipe.yaml:8: train_sampling_strategy: `group_by_lenght` is not one of random, sequential, "
            "group_by_length. Did you mean `group_by_length`?",
            "train_sampling_strategy: group_by_lenght",
        ),
        Mistake(
            "adapter settings without an adapter",
            "recipe.yaml:8: lora_r: has no effect without an adapter. Write use_peft: true.",
            "lora_r: 8",
        ),
        Mistake(
            "a reference nobody reads",
            "recipe.yaml:5: reference: sft needs no reference, so this has no effect. Remove the block.",
            "name: sft\nreference: {model: other}",
            "name: dpo\n  beta: 0.1",
        ),
        Mistake(
            "no reference for a loss that needs one",
            "recipe.yaml:8: reference.source: dpo needs a reference. Write source: auto.",
            "reference: {source: none}",
        ),
        Mistake(
            "evaluation without rows",
            "recipe.yaml:8: eval_strategy: there are no rows to evaluate on. Write test_split_size: 0.1, or "
            "data_files: {train: ..., test: ...}.",
            "eval_strategy: steps",
        ),
        Mistake(
            "misspelt field of a new model",
            "recipe.yaml:1: from_scratch: `llama` has no field `hiden_size`. Did you mean `hidden_size`?",
            "from_scratch: {model_type: llama, hiden_size: 64}",
            "model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct",
        ),
        Mistake(
            "a token in the recipe",
            "recipe.yaml:8: run_name: this looks like an access token. Remove it, and set HF_TOKEN or run "
            "`hf auth login`.",
            "run_name: hf_AbCdEfGhIjKlMnOpQrStUvWx",
        ),
        Mistake(
            "Python in the recipe",
            "recipe.yaml:8: run_name: the tag `tag:yaml.org,2002:python/object/apply:os.system` is not read here. "
            "Write a plain value.",
            "run_name: !!python/object/apply:os.system [true]",
        ),
    ]
