"""An answer that was cut off is read without an end marker; the other answer of its row keeps its own."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.data.drafts import content_id
from prefopt.data.formats import Example, make_example, unpair
from prefopt.data.problems import Where
from prefopt.data.sources import load_examples
from prefopt.data.spec import DataSpec
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import DataError
from tests.data.test_templates import NEWLINES, NO_MARKER, PLAIN, STRIPS_HISTORY, assistant, tokenizer_with, user
from tests.helpers import make_tokenizer

TEXT = {"prompt": "the cat", "chosen": " sat", "rejected": " on a mat"}
CHAT = {"prompt": [user("the cat")], "chosen": [assistant("sat")], "rejected": [assistant("on a mat")]}


def example(parts, *unfinished: str) -> Example:
    return make_example(parts["prompt"], chosen=parts["chosen"], rejected=parts["rejected"],
                        unfinished=unfinished, columns={}, where=Where("rows", 0))  # fmt: skip


def row(parts, tokenizer, *unfinished: str):
    return tokenize_examples([example(parts, *unfinished)], tokenizer, TokenSettings()).rows[0]


@pytest.mark.parametrize("template", [PLAIN, NEWLINES, STRIPS_HISTORY, NO_MARKER])
@pytest.mark.parametrize("parts", [TEXT, CHAT], ids=["text", "chat"])
def test_the_end_marker_alone_is_missing(template, parts):
    tokenizer = tokenizer_with(template)
    whole, cut = row(parts, tokenizer), row(parts, tokenizer, "rejected")
    assert whole["rejected_ids"][-1] == tokenizer.eos_token_id
    assert np.array_equal(cut["rejected_ids"], whole["rejected_ids"][:-1])
    assert cut["rejected_scored"].all() and len(cut["rejected_scored"]) == len(cut["rejected_ids"])
    assert np.array_equal(cut["chosen_ids"], whole["chosen_ids"])


def test_other_ids_are_other_examples():
    whole, cut = example(TEXT), example(TEXT, "rejected")
    assert whole.example_id != cut.example_id
    assert content_id(whole, False) != content_id(cut, False)


def test_a_pair_taken_apart_keeps_it():
    good, bad = unpair(example(TEXT, "rejected"))
    assert (good.unfinished, bad.unfinished) == ((), ("completion",))
    ids = tokenize_examples([bad], make_tokenizer(), TokenSettings()).rows[0]["completion_ids"]
    assert ids[-1] != make_tokenizer().eos_token_id


def test_it_is_read_from_rows():
    rows = [{**TEXT, "unfinished": ["rejected"]}, {**TEXT, "chosen": " saw", "unfinished": None}]
    assert [one.unfinished for one in load_examples(DataSpec(rows=rows)).examples] == [("rejected",), ()]


@pytest.mark.parametrize("value", ["rejected", ["completion"], 1])
def test_names_that_are_no_answers_of_the_row_are_refused(value):
    with pytest.raises(DataError, match=r"`unfinished`: .* not a list of answers \(`chosen`, `rejected`\)"):
        load_examples(DataSpec(rows=[{**TEXT, "unfinished": value}]))


def test_a_template_that_hides_where_the_content_ends_is_refused():
    twice = "{% for m in messages %}{{ m['content'] + m['content'] + '</s>' }}{% endfor %}"
    with pytest.raises(DataError, match="cannot tell where an assistant turn ends"):
        row(CHAT, tokenizer_with(twice), "rejected")
