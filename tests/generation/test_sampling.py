"""Answers sampled from a model: reproducible, on-policy, and without a trace on the model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.data.formats import Example
from prefopt.data.problems import Where
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import DataError, UserError
from prefopt.generation import encode_prompts, generate
from tests import helpers

PROMPTS = ["the cat", "two red birds fly over old stone walls", "a mat"]


def sample(model, tokenizer, prompts=PROMPTS, **options):
    return generate(model, tokenizer, prompts, **{"max_new_tokens": 12, "samples_per_prompt": 2, **options})


def always(model, token):
    """Make the model write one token whatever it reads: its embedding direction is the only one the head rewards."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    model.lm_head.bias.data[token] = 50.0
    return model


def test_same_seed_same_answers_other_seed_other_answers(model, tokenizer):
    first, again, other = (sample(model, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_prompts_of_the_same_distribution_have_answers_of_their_own(model, tokenizer):
    """A model that reads nothing would answer all prompts alike, were their random numbers the same."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
    answers = sample(model, tokenizer, samples_per_prompt=1)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("cut", [{"temperature": 1e-4}, {"top_p": 1e-6}])
def test_a_cut_to_the_likeliest_token_is_greedy(model, tokenizer, cut):
    greedy = sample(model, tokenizer, temperature=0)
    assert [answer.token_ids for answer in sample(model, tokenizer, **cut)] == [answer.token_ids for answer in greedy]


def test_a_prompt_without_room_is_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"max_new_tokens: the longest prompt has .* passes the model's 512 positions"):
        sample(model, tokenizer, max_new_tokens=505)


def test_answers_come_in_the_order_of_the_prompts_and_differ(model, tokenizer):
    answers = sample(model, tokenizer, samples_per_prompt=3)
    assert [answer.prompt_index for answer in answers] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(answer.token_ids) for answer in answers}) > 3


def test_an_answer_that_ends_is_finished_and_its_text_has_no_marker(model, tokenizer):
    answer = sample(always(model, tokenizer.eos_token_id), tokenizer)[0]
    assert answer.finished
    assert answer.token_ids == [tokenizer.eos_token_id]
    assert answer.text == ""


def test_an_answer_that_hits_the_limit_is_not_finished(model, tokenizer):
    token = tokenizer("cat", add_special_tokens=False)["input_ids"][-1]
    answer = sample(always(model, token), tokenizer, max_new_tokens=5)[0]
    assert not answer.finished
    assert answer.token_ids == [token] * 5


def test_padding_after_an_end_marker_is_not_part_of_the_answer(model, tokenizer):
    # Half the answers end early, so the others make the batch longer than them.
    always(model, tokenizer.eos_token_id).lm_head.bias.data.zero_()
    model.lm_head.bias.data[tokenizer.eos_token_id] = 4.0
    answers = sample(model, tokenizer, samples_per_prompt=20, max_new_tokens=30)
    ended = [answer.token_ids for answer in answers if answer.finished]
    assert len({len(ids) for ids in ended}) > 1
    assert all(ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id for ids in ended)


def test_every_published_end_marker_ends_an_answer(model, tokenizer):
    other = tokenizer("cat", add_special_tokens=False)["input_ids"][-1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert sample(always(model, other), tokenizer)[0].finished


def test_left_padding_does_not_change_an_answer(model, tokenizer):
    together = sample(model, tokenizer, samples_per_prompt=1, temperature=0, batch_size=3)
    alone = sample(model, tokenizer, samples_per_prompt=1, temperature=0, batch_size=1)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_stored_generation_settings_neither_leak_in_nor_get_lost(model, tokenizer):
    plain = sample(model, tokenizer)
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    assert sample(model, tokenizer) == plain
    stored = model.generation_config
    assert (stored.top_k, stored.repetition_penalty, stored.max_new_tokens) == (1, 5.0, 3)


def test_an_adapter_model_keeps_its_settings_too(model, tokenizer):
    model.generation_config.repetition_penalty = 5.0
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    sample(policy, tokenizer)
    assert policy.get_base_model().generation_config.repetition_penalty == 5.0
    assert policy.generation_config.repetition_penalty == 5.0


def test_mode_and_random_state_are_put_back(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    sample(model, tokenizer)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_is_off_while_sampling(tokenizer):
    model = helpers.make_model(vocab_size=len(tokenizer), attention_dropout=0.5).train()
    greedy = [sample(model, tokenizer, temperature=0, samples_per_prompt=1, seed=seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_text_prompts_have_the_ids_they_have_in_training(adds_bos):
    tokenizer = helpers.make_tokenizer(adds_bos=adds_bos)
    examples = [Example("a", prompt, " x", " y", where=Where("rows", row)) for row, prompt in enumerate(PROMPTS)]
    rows = tokenize_examples(examples, tokenizer, TokenSettings()).rows
    assert encode_prompts(tokenizer, PROMPTS) == [list(row["prompt_ids"]) for row in rows]


def test_chat_prompts_have_the_ids_they_have_in_training(tokenizer):
    prompt = [{"role": "user", "content": "the cat"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("sat", "saw")]
    rows = tokenize_examples([Example("a", prompt, *answers, where=Where("rows", 0))], tokenizer, TokenSettings()).rows
    assert encode_prompts(tokenizer, [prompt]) == [list(rows[0]["prompt_ids"])]


def test_template_arguments_reach_the_template(tokenizer):
    tokenizer = helpers.make_tokenizer()
    tokenizer.chat_template = "{{ 'cat' if loud else 'mat' }}"
    loud = encode_prompts(tokenizer, [[{"role": "user", "content": ""}]], {"loud": True})
    assert tokenizer.decode(loud[0]) == "cat"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["the cat", ""], "prompts, row 1.*no tokens"),
        ([[{"role": "user"}]], "prompts, row 0.*chat template fails"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(model, tokenizer, prompts, message):
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, prompts)


@pytest.mark.parametrize(
    "options",
    [{"samples_per_prompt": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"batch_size": 0}],
)
def test_arguments_out_of_range_are_refused_by_name(model, tokenizer, options):
    with pytest.raises(UserError, match=next(iter(options))):
        sample(model, tokenizer, **options)
