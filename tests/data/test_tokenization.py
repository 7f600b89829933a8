"""Token rows: exact text back, one BOS, one end marker, masks by position, every lost row told."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefopt.data.drafts import TextEncoder
from prefopt.data.formats import Example, RowParser
from prefopt.data.problems import RawRow, Where
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import DataError, UserError
from tests.helpers import WORDS, make_tokenizer, text_pairs

BOS, EOS = 1, 2


def examples_of(rows: list[dict[str, Any]]) -> list[Example]:
    parser = RowParser()
    return [parser.parse(RawRow(Where("rows.jsonl", index, index + 1), dict(row))) for index, row in enumerate(rows)]


def raw_example(line: int = 8, **parts: Any) -> Example:
    return Example("0" * 16, where=Where("rows.jsonl", line - 1, line), **parts)


def chat_pair(prompt: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": turn("user", prompt),
        "chosen": turn("assistant", chosen),
        "rejected": turn("assistant", rejected),
        **extra,
    }


def tokenize(rows: list[dict[str, Any]], tokenizer, settings: TokenSettings | None = None, **more: Any):
    return tokenize_examples(examples_of(rows), tokenizer, settings or TokenSettings(), **more)


def decode(tokenizer, *parts: np.ndarray) -> str:
    return tokenizer.decode(np.concatenate(parts).tolist(), clean_up_tokenization_spaces=False)


def blank_adding_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a blank is put before every text (`always`) or before the first one (`first`)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = sorted({*"".join(WORDS), "\n", ".", "▁", *"abcdefghijklmnopqrstuvwxyz"})
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


# Text rows


def test_prompt_and_answer_give_the_text_back_although_tokens_would_merge_over_the_border():
    tokenizer = make_tokenizer()
    assert len(tokenizer("cat")["input_ids"]) == 1
    rows = [{"prompt": "the ca", "chosen": "t sat", "rejected": "ts fly"}]
    (row,), _ = tokenize(rows, tokenizer)
    assert row["prompt_ids"].tolist() == tokenizer("the ca")["input_ids"]
    assert decode(tokenizer, row["prompt_ids"], row["chosen_ids"]) == "the cat sat</s>"
    assert decode(tokenizer, row["prompt_ids"], row["rejected_ids"]) == "the cats fly</s>"
    assert row["chosen_scored"].all() and row["rejected_scored"].all()


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_blank_slips_in_between_prompt_and_answer(scheme):
    tokenizer = blank_adding_tokenizer(scheme)
    rows = [
        {"prompt": "the ca", "chosen": "t sat", "rejected": " sat"},
        {"prompt": "two birds ", "chosen": "fly", "rejected": "\nfly over"},
    ]
    for row, source in zip(tokenize(rows, tokenizer).rows, rows, strict=True):
        for side in ("chosen", "rejected"):
            ids = np.concatenate([row["prompt_ids"], row[f"{side}_ids"]])
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert text.removeprefix(" ") == source["prompt"] + source[side]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_every_text_answer_ends_with_exactly_one_scored_eos(pad_is_eos):
    tokenizer = make_tokenizer(pad_is_eos=pad_is_eos)
    rows = [*text_pairs(20), {"prompt": "the cat", "chosen": " sat</s>", "rejected": " saw a mat"}]
    for row in tokenize(rows, tokenizer).rows:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_ids"].tolist().count(EOS) == 1
            assert row[f"{side}_ids"][-1] == EOS and row[f"{side}_scored"][-1]


def test_conservation_every_answer_token_is_scored():
    tokenizer = make_tokenizer()
    chats = [
        chat_pair(row["prompt"], row["chosen"].strip(), row["rejected"].strip()) for row in text_pairs(200, seed=1)
    ]
    for rows in (text_pairs(200), chats):
        tokenized, report = tokenize(rows, tokenizer)
        assert all(row[f"{side}_scored"].all() for row in tokenized for side in ("chosen", "rejected"))
        total = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in tokenized)
        assert report.tokens["scored"] == total == report.tokens["chosen"] + report.tokens["rejected"]


def test_bos_is_there_once_if_the_tokenizer_adds_it_and_never_otherwise():
    rows = text_pairs(3)
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        for row in tokenize(rows, tokenizer).rows:
            ids = np.concatenate([row["prompt_ids"], row["chosen_ids"]]).tolist()
            assert ids.count(BOS) == int(adds_bos) and (ids[0] == BOS) == adds_bos


def test_template_and_tokenizer_do_not_both_write_the_bos():
    (row,), _ = tokenize([chat_pair("the cat", "sat", "saw")], make_tokenizer(adds_bos=True))
    assert row["prompt_ids"].tolist().count(BOS) == 1 and row["prompt_ids"][0] == BOS


def test_two_bos_are_refused_with_the_cause():
    tokenizer = make_tokenizer(adds_bos=True)
    with pytest.raises(DataError, match=r"rows\.jsonl:2, prompt.*the tokenizer adds another"):
        tokenize([*text_pairs(1), {"prompt": "<s>the", "chosen": " cat", "rejected": " mat"}], tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match=r"rows\.jsonl:1, prompt.*chat template writes it twice"):
        tokenize([chat_pair("the", "cat", "mat")], tokenizer)


def test_an_eos_the_tokenizer_puts_after_every_text_is_not_part_of_the_prompt():
    tokenizer = make_tokenizer()
    expected = tokenize(text_pairs(3), make_tokenizer(adds_bos=True)).rows
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("the")["input_ids"][-1] == EOS
    for row, wanted in zip(tokenize(text_pairs(3), tokenizer).rows, expected, strict=True):
        assert row["prompt_ids"].tolist() == wanted["prompt_ids"].tolist()
        assert row["chosen_ids"].tolist() == wanted["chosen_ids"].tolist()


def test_empty_prompt_with_and_without_a_bos():
    rows = [{"prompt": "", "chosen": "the cat", "rejected": "a mat"}]
    (row,), _ = tokenize(rows, make_tokenizer())
    assert row["prompt_ids"].tolist() == [BOS] and row["chosen_scored"].all()
    (row,), report = tokenize(rows, make_tokenizer(bos=False))
    assert row["prompt_ids"].tolist() == []
    for side in ("chosen", "rejected"):
        assert not row[f"{side}_scored"][0] and row[f"{side}_scored"][1:].all()
    assert report.tokens["scored"] == report.tokens["chosen"] + report.tokens["rejected"] - 2


def test_without_bos_no_none_and_no_negative_id_gets_in(monkeypatch):
    tokenizer = make_tokenizer(bos=False)
    for row in tokenize([*text_pairs(5)], tokenizer).rows:
        assert all(row[f"{part}_ids"].dtype == np.int32 for part in ("prompt", "chosen", "rejected"))
        assert min(row["prompt_ids"].min(), row["chosen_ids"].min()) >= 0
    monkeypatch.setattr(TextEncoder, "continuations", lambda self, texts: {text: [5, None] for text in texts})
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*vocabulary of 320"):
        tokenize(text_pairs(1), tokenizer)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        tokenize(text_pairs(1), tokenizer)


def test_text_of_every_script_comes_back_unchanged():
    tokenizer = make_tokenizer()
    texts = ["👩\u200d👩\u200d👧 ok", "\u202eright to left\u202c", "e\u0301 und ß", "  two  blanks \n\n"]
    rows = [{"prompt": text, "chosen": text + "!", "rejected": text + "?"} for text in texts]
    for row, text in zip(tokenize(rows, tokenizer).rows, texts, strict=True):
        assert decode(tokenizer, row["prompt_ids"], row["chosen_ids"]) == f"{text}{text}!</s>"


# Rows, columns, report


def test_rows_keep_order_place_and_identity():
    examples = examples_of(text_pairs(7))
    tokenized = tokenize_examples(examples, make_tokenizer(), TokenSettings()).rows
    assert [row["row"] for row in tokenized] == list(range(7))
    assert [row["example_id"] for row in tokenized] == [example.example_id for example in examples]
    assert all(row["columns"] == {} and "desirable" not in row for row in tokenized)


def test_chunks_do_not_matter(monkeypatch):
    rows = [chat_pair(row["prompt"], row["chosen"], row["rejected"]) for row in text_pairs(11)]
    tokenizer = make_tokenizer()
    whole = tokenize(rows, tokenizer).rows
    monkeypatch.setattr("prefopt.data.drafting.CHUNK", 3)
    for row, other in zip(tokenize(rows, tokenizer).rows, whole, strict=True):
        assert row.keys() == other.keys()
        assert all(np.array_equal(row[key], other[key]) for key in row if key != "columns")


def test_labelled_answers():
    rows = [{"prompt": "the", "completion": " cat", "label": 1}, {"prompt": "a", "completion": " mat", "label": False}]
    tokenized, report = tokenize(rows, make_tokenizer())
    assert [row["desirable"] for row in tokenized] == [True, False]
    assert {"completion_ids", "completion_scored"} <= tokenized[0].keys()
    assert tokenized[0]["completion_ids"][-1] == EOS and "chosen_ids" not in tokenized[0]
    assert set(report.lengths) == {"prompt", "completion", "row"}


def test_columns_become_floats_and_optional_ones_are_all_or_nothing():
    rows = [dict(row, score_chosen=index, note="x") for index, row in enumerate(text_pairs(3))]
    tokenizer = make_tokenizer()
    tokenized = tokenize(rows, tokenizer, columns=("score_chosen",), optional_columns=("weight",)).rows
    assert [row["columns"] for row in tokenized] == [{"score_chosen": float(index)} for index in range(3)]
    weighted = [dict(row, weight=0.5) for row in rows]
    tokenized = tokenize(weighted, tokenizer, columns=("score_chosen",), optional_columns=("weight",)).rows
    assert tokenized[2]["columns"] == {"score_chosen": 2.0, "weight": 0.5}
    del weighted[1]["weight"]
    with pytest.raises(UserError, match=r"rows\.jsonl:2.*weight"):
        tokenize(weighted, tokenizer, optional_columns=("weight",))
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*offset"):
        tokenize(rows, tokenizer, columns=("offset",))


def test_a_target_is_an_answer_like_chosen():
    """Of text and of conversations; a target that is the chosen answer has its ids, and no column of numbers."""
    tokenizer = make_tokenizer()
    chats = [chat_pair(f"say {word}", f"the {word}", f"a {word}") for word in WORDS[:5]]
    for rows in (text_pairs(5), chats):
        same = tokenize(
            [{**row, "target": row["chosen"]} for row in rows], tokenizer, optional_columns=("target",)
        ).rows
        for row in same:
            assert row["target_ids"].tolist() == row["chosen_ids"].tolist()
            assert row["target_scored"].tolist() == row["chosen_scored"].tolist()
            assert row["columns"] == {}
        other = tokenize([{**row, "target": row["rejected"]} for row in rows], tokenizer, columns=("target",))
        assert [row["target_ids"].tolist() for row in other.rows] == [
            row["rejected_ids"].tolist() for row in other.rows
        ]
        parts = other.report.tokens
        assert parts["target"] == parts["rejected"]
        assert parts["plain"] == 3 * parts["prompt"] + parts["chosen"] + 2 * parts["rejected"]
    settings = TokenSettings(max_length=12, max_dropped=1.0)
    long = [{"prompt": "the cat", "chosen": " a mat", "rejected": " a wall", "target": " and" * 20}]
    assert set(tokenize(long, tokenizer, settings, columns=("target",)).report.noted) == {"eos_cut"}
    unread = tokenize([{**row, "target": row["chosen"]} for row in text_pairs(3)], tokenizer)
    assert "target_ids" not in unread.rows[0]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ([{"role": "user", "content": "say it"}, {"role": "assistant", "content": "b"}], "it repeats the prompt"),
        ([{"role": "assistant", "content": " "}], "nothing but blanks"),
        ("text", "the value is text; the row's answers are messages"),
    ],
)
def test_a_target_keeps_the_rules_of_an_answer(target, told):
    row = chat_pair("say it", "a", "b", target=target)
    with pytest.raises(DataError, match=told):
        tokenize([row], make_tokenizer(), optional_columns=("target",))


def test_a_target_in_some_rows_only_is_refused():
    rows = text_pairs(3)
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*`?target`?.*missing here"):
        tokenize([{**rows[0], "target": " a"}, *rows[1:]], make_tokenizer(), optional_columns=("target",))


def test_pairs_identical_after_tokenising_are_counted_and_left_out():
    same = {"prompt": "the", "chosen": " cat", "rejected": " cat</s>"}
    rows = text_pairs(10)
    for index in (2, 5, 9):
        rows[index] = same
    tokenizer = make_tokenizer()
    tokenized, report = tokenize(rows, tokenizer)
    assert [row["row"] for row in tokenized] == [0, 1, 3, 4, 6, 7, 8]
    assert report.dropped["identical_after_tokenising"].count == 3
    assert report.dropped["identical_after_tokenising"].places == ["rows.jsonl:3", "rows.jsonl:6", "rows.jsonl:10"]
    with pytest.raises(DataError, match=r"rows\.jsonl:3.*same tokens"):
        tokenize(rows, tokenizer, TokenSettings(identical_pairs="refuse"))
    with pytest.raises(DataError, match="nothing to learn"):
        tokenize([same] * 4, tokenizer)


def test_an_over_long_prompt_is_refused_by_default_and_told_when_allowed():
    rows = text_pairs(4)
    rows[2]["prompt"] = " ".join(WORDS)
    tokenizer = make_tokenizer()
    length = len(tokenizer(rows[2]["prompt"])["input_ids"])
    with pytest.raises(DataError) as caught:
        tokenize(rows, tokenizer, TokenSettings(max_length=length))
    for word in ("rows.jsonl:3", f"prompt {length} tokens", f"limit {length}", "1 of 4", "max_dropped"):
        assert word in str(caught.value)
    tokenized, report = tokenize(rows, tokenizer, TokenSettings(max_length=length, max_dropped=0.25))
    assert [row["row"] for row in tokenized] == [0, 1, 3]
    assert report.dropped["prompt_too_long"].count == 1 and (report.examples, report.kept) == (4, 3)


def test_prompts_one_token_below_the_limit_leave_no_signal():
    rows = [{"prompt": "the cat", "chosen": " sat on", "rejected": " sat near"}] * 2 + text_pairs(1)
    tokenizer = make_tokenizer()
    limit = len(tokenizer("the cat")["input_ids"]) + 1
    rows[2] = {"prompt": "the", "chosen": " cat", "rejected": " mat"}
    tokenized, report = tokenize(rows, tokenizer, TokenSettings(max_length=limit, max_dropped=1.0))
    assert len(tokenized) == 1 and report.dropped["no_signal_after_truncation"].count == 2


def test_a_cut_answer_is_told_and_which_side_lost_its_end():
    rows = [{"prompt": "the", "chosen": " cat sat on a mat and saw two red birds", "rejected": " mat over"}]
    tokenizer = make_tokenizer()
    (row,), report = tokenize(rows, tokenizer, TokenSettings(max_length=8))
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 8 and EOS not in row["chosen_ids"]
    assert row["rejected_ids"][-1] == EOS
    assert report.noted["eos_cut"].count == report.noted["eos_cut_one_sided"].count == 1
    (row,), report = tokenize(rows, tokenizer, TokenSettings(max_length=8, cut_answers="same_length"))
    assert len(row["chosen_ids"]) == len(row["rejected_ids"]) and "eos_cut_one_sided" not in report.noted


def test_the_report_counts_tokens_and_is_plain_data():
    tokenized, report = tokenize(text_pairs(30), make_tokenizer())
    told = json.loads(json.dumps(report.as_dict()))
    prompt = sum(len(row["prompt_ids"]) for row in tokenized)
    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in tokenized)
    assert told["tokens"]["plain"] == 2 * prompt + answers and told["tokens"]["shared"] == prompt + answers
    assert told["lengths"]["prompt"]["max"] == max(len(row["prompt_ids"]) for row in tokenized)
    assert report.lines()[0].startswith("30 of 30 rows kept")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_dropped": 1.5}, "max_dropped"),
        ({"prompt_boundary": "prefix"}, "common_prefix"),
        ({"identical_pairs": "no"}, "drop"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        TokenSettings(**settings)


def test_pairs_and_labelled_answers_do_not_mix():
    examples = [*examples_of(text_pairs(2)), raw_example(prompt="the", completion=" cat", desirable=True)]
    with pytest.raises(DataError, match=r"rows\.jsonl:8.*mixed"):
        tokenize_examples(examples, make_tokenizer(), TokenSettings())


def test_no_examples_is_an_error():
    with pytest.raises(DataError, match="no examples"):
        tokenize_examples([], make_tokenizer(), TokenSettings())


def test_a_conversation_needs_a_template():
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*chat template"):
        tokenize([chat_pair("the", "cat", "mat")], make_tokenizer(chat=False))


# Real conversations, against the tokenizer called directly


def direct_ids(tokenizer, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected as the common trainers make them: cut where prompt and whole conversation diverge."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    wholes = [tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")]
    assert all(whole[: len(prompt)] == prompt for whole in wholes)
    return prompt, wholes[0][len(prompt) :], wholes[1][len(prompt) :]


def test_real_conversations_have_the_ids_of_the_tokenizers_own_rendering(shared_data):
    lines = (shared_data / "judged_pairs_eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(0).sample(lines, 20)]
    tokenizer = make_tokenizer()
    settings = TokenSettings(max_length=None)
    tokenized, report = tokenize(rows, tokenizer, settings, columns=("score_chosen", "score_rejected"))
    assert len(tokenized) == 20 and not report.dropped and not report.noted
    for row, source in zip(tokenized, rows, strict=True):
        made = tuple(row[f"{part}_ids"].tolist() for part in ("prompt", "chosen", "rejected"))
        assert made == direct_ids(tokenizer, source)
        assert row["columns"]["score_chosen"] == source["score_chosen"]
