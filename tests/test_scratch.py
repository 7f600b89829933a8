"""Tokenizers and models made from nothing."""

from __future__ import annotations

import pytest
import torch

from prefopt.errors import RecipeError
from prefopt.scratch import ROLES, build_model, train_tokenizer

TEXTS = ["the cat sat on a mat", "two red birds fly over old stone walls"] * 4
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def chat_tokenizer():
    return train_tokenizer(TEXTS, 320, chat=True)


@pytest.mark.parametrize("text", ["the cat sat", " a mat,\n\ttwo  birds ", "Zürich, 東京 🙂", "<|user|>", ""])
def test_text_round_trip(text):
    tokenizer = train_tokenizer(TEXTS, 320)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_bos_is_added_and_eos_is_not():
    tokenizer = train_tokenizer(TEXTS, 320)
    ids = tokenizer("the cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_vocabulary_is_at_most_what_was_asked_for():
    assert len(train_tokenizer(TEXTS, 280)) == 280
    assert len(train_tokenizer(TEXTS, 5000)) < 5000


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(RecipeError, match="need 259"):
        train_tokenizer(TEXTS, 258)


def test_saved_and_loaded_tokenizer_is_the_same(chat_tokenizer, tmp_path):
    chat_tokenizer.save_pretrained(tmp_path)
    loaded = type(chat_tokenizer).from_pretrained(tmp_path)
    assert loaded("the cat sat")["input_ids"] == chat_tokenizer("the cat sat")["input_ids"]
    assert loaded.chat_template == chat_tokenizer.chat_template


def test_chat_turns_have_one_token_headers_and_end_with_eos(chat_tokenizer):
    tokenizer = chat_tokenizer
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    headers = [tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant")]
    assert ids[:2] == [tokenizer.bos_token_id, headers[0]]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(headers[1]) == 1
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids[-1] == tokenizer.eos_token_id


def test_generation_prompt_begins_the_whole_conversation(chat_tokenizer):
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    opening = chat_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = chat_tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "sat"}], tokenize=False)
    assert whole == opening + "sat" + chat_tokenizer.eos_token


def test_every_role_of_the_data_room_is_rendered(chat_tokenizer):
    text = chat_tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in ROLES], tokenize=False)
    assert [text.count(f"<|{role}|>x") for role in ROLES] == [1] * len(ROLES)


@pytest.mark.parametrize(
    "message",
    [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
    ids=["unknown role", "tool calls"],
)
def test_what_the_template_cannot_show_is_refused(chat_tokenizer, message):
    with pytest.raises(Exception, match=r"unknown role: wizard|no place for tool calls"):
        chat_tokenizer.apply_chat_template([message], tokenize=False)


def test_model_takes_vocabulary_and_special_ids_from_the_tokenizer(chat_tokenizer):
    model = build_model(LLAMA, chat_tokenizer, seed=0)
    config = model.config
    ids = (chat_tokenizer.bos_token_id, chat_tokenizer.eos_token_id, chat_tokenizer.pad_token_id)
    assert config.vocab_size == len(chat_tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert model.dtype == torch.float32


def test_weights_follow_the_seed_and_leave_the_random_state_alone(chat_tokenizer):
    state = torch.get_rng_state()
    models = [build_model(LLAMA, chat_tokenizer, seed) for seed in (3, 3, 4)]
    heads = [model.get_output_embeddings().weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "Did you mean `llama`"),
        ({"model_type": None}, "model_type"),
        ({"hiden_size": 32}, "Did you mean `hidden_size`"),
        ({"hidden_size": 30}, "30"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 100}, "the tokenizer has"),
    ],
)
def test_wrong_fields_are_refused(chat_tokenizer, change, message):
    with pytest.raises(RecipeError, match=f"from_scratch.*{message}"):
        build_model({**LLAMA, **change}, chat_tokenizer, seed=0)


def test_numbers_only_the_layers_check_are_refused(chat_tokenizer):
    with pytest.raises(RecipeError, match="cannot build this model"):
        build_model({"model_type": "gpt2", "n_embd": 32, "n_head": 3, "n_layer": 1}, chat_tokenizer, seed=0)
