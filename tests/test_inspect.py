"""The microscope: roles, masks and segments of a row, and what two models say of its tokens, in text and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from prefopt import cli
from prefopt.errors import DataError, UserError
from prefopt.inspect.command import inspect_row
from prefopt.inspect.page import page_of
from prefopt.inspect.rows import RowView, Stretch, Token
from prefopt.recipe import load_recipe
from tests.helpers import make_model, make_tokenizer
from tests.oracle.trainers import noisy

ROW = {
    "prompt": [{"role": "system", "content": "near"}, {"role": "user", "content": "the <b>cat</b> & you?"}],
    "chosen": [
        {"role": "assistant", "content": "a mat"},
        {"role": "tool", "content": "stone walls"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "two red birds"},
    ],
    "rejected": [
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "saw"},
        {"role": "assistant", "content": "quiet river"},
    ],
    "segments": {"chosen": [1], "rejected": [1]},
}
TEXT = {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " fly"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A starting model and a trained one, as folders."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("start", make_model()), ("trained", noisy(make_model(), 3))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def recipe(models, tmp_path, *rows: dict[str, Any], loss: str = "segment_dpo", **changes: Any):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_recipe(loss).replace(
        model_name_or_path=str(models / "start"), from_scratch=None, data_files=str(file), dataset_name=None,
        eval_strategy="no", use_cpu=True, **changes,
    )  # fmt: skip


def words(stretch: Stretch) -> str:
    return "".join(token.text for token in stretch.tokens)


def test_the_stretches_of_a_row_are_those_of_its_messages(models, tmp_path):
    view = inspect_row(recipe(models, tmp_path, ROW), 0)
    assert [(part.role, words(part)) for part in view.prompt] == [
        ("system", "<s><|system|>near"),
        ("user", "<|user|>the <b>cat</b> & you?"),
        ("header of the answer", "<|assistant|>"),
    ]
    assert [(part.role, part.turn, part.weight, words(part)) for part in view.answers["chosen"]] == [
        ("assistant", 0, 0.0, "a mat</s>"),
        ("tool + user", None, 1.0, "<|tool|>stone walls<|user|>and<|assistant|>"),
        ("assistant", 1, 1.0, "two red birds</s>"),
    ]
    assert [part.counts for part in view.answers["rejected"]] == [False, False, True]
    assert view.numbers == ()


def test_text_rows_are_a_prompt_and_answers(models, tmp_path):
    view = inspect_row(recipe(models, tmp_path, TEXT, loss="dpo"), 0)
    assert [part.role for part in view.prompt] == ["prompt"]
    (answer,) = view.answers["chosen"]
    assert (answer.turn, words(answer)) == (0, " sat on a mat</s>")


def test_numbers_are_those_of_the_models_own_logits(models, tmp_path):
    view = inspect_row(recipe(models, tmp_path, ROW), 0, model=str(models / "trained"))
    tokenizer, trained, start = make_tokenizer(), noisy(make_model(), 3), make_model()
    for side in ("chosen", "rejected"):
        ids = torch.tensor([tokenizer.apply_chat_template([*ROW["prompt"], *ROW[side]])["input_ids"]])
        with torch.no_grad():
            after, before = (model(ids).logits[0].log_softmax(-1) for model in (trained, start))
        kl = (before.exp() * (before - after)).sum(-1)
        stretches = view.answers[side]
        place = ids.shape[1] - sum(len(part.tokens) for part in stretches)
        for part in stretches:
            for token in part.tokens:
                if part.turn is None:
                    assert not token.numbers
                else:
                    logp = after[place - 1, ids[0, place]].item()
                    expected = {"logp": logp, "before": 0.0, "after": logp - before[place - 1, ids[0, place]].item(),
                                "kl": kl[place - 1].item()}  # fmt: skip
                    assert token.numbers == pytest.approx(expected, abs=2e-5)
                place += 1


def test_a_reference_of_its_own_shows_where_training_began(models, tmp_path):
    changed = recipe(models, tmp_path, ROW, reference={"model": str(models / "trained")})
    view = inspect_row(changed, 0, model=str(models / "trained"))
    turn = view.answers["chosen"][-1]
    assert turn.total("after") == pytest.approx(0.0, abs=1e-5) and turn.total("kl") == pytest.approx(0.0, abs=1e-4)
    assert abs(turn.total("before")) > 1e-3


def test_the_margin_is_that_of_the_turns_that_count(models, tmp_path):
    view = inspect_row(recipe(models, tmp_path, ROW), 0, model=str(models / "trained"))
    sums = {
        side: sum(stretch.total("after") for stretch in stretches if stretch.counts)
        for side, stretches in view.answers.items()
    }
    assert any(stretch.weight == 0 for stretches in view.answers.values() for stretch in stretches)
    assert (view.margin or "").startswith("plain log-ratio to the reference after training, summed over what counts: ")
    assert f"margin {sums['chosen'] - sums['rejected']:+.3f} nats" in (view.margin or "")


def test_a_reference_that_moved_is_told_from_where_it_began(models, tmp_path):
    def notes(reference, model=str(models / "trained")):
        return inspect_row(recipe(models, tmp_path, ROW, reference=reference), 0, model=model).notes

    assert notes({}) == notes({"sync_steps": 64}, model=None) == ()
    for name, given in (("start", {}), ("trained", {"model": str(models / "trained")})):
        (note,) = notes({"sync_steps": 64, **given})
        assert f"are to {models / name}, where the reference began: it moved" in note


class Page(HTMLParser):
    """The visible text of a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.fetched, self.open = "", [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data


@pytest.mark.parametrize("with_model", [False, True])
def test_the_page_is_whole_escaped_and_fetches_nothing(models, tmp_path, with_model):
    view = inspect_row(recipe(models, tmp_path, ROW), 0, model=str(models / "trained") if with_model else None)
    html = page_of(view, "Row 0")
    page = Page()
    page.feed(html)
    assert page.open == [] and page.fetched == [] and "url(" not in html and "<script" not in html
    assert "<b>" not in html and "&lt;" in html and "&amp;" in html
    plain = re.sub(r"[+-]\d\.\d\d\d\.\d{3}", "", page.text)  # log-ratio and KL under a token
    assert all(said in plain for said in ("two red birds</s>", "stone walls", "turn 1, weight 1", "tool + user"))
    assert ("ratio after" in page.text) == with_model


def test_the_largest_log_ratio_of_a_row_has_the_full_colour_and_the_legend_says_so():
    def page(*ratios):
        tokens = tuple(Token(f"t{ratio}", {"after": ratio, "kl": 0.01}) for ratio in ratios)
        view = RowView("rows, row 0", (), {"chosen": (Stretch("assistant", tokens, 0),)}, numbers=("after", "kl"))
        return page_of(view, "Row 0")

    for ratios, full in (((0.05, -0.1), "0.1"), ((0.5, -9.0), "2"), ((0.0,), "2")):
        assert f"by {full} nats or more" in page(*ratios)
    assert page(0.05, -0.1).count("rgba(218,54,51,0.60)") == 2  # the token, and the legend
    assert page(0.05, -0.1).count("rgba(46,160,67,0.30)") == 1


def test_the_command_prints_and_writes(models, tmp_path, capsys):
    changed = recipe(models, tmp_path, ROW)
    changed.dump(tmp_path / "recipe.yaml")
    assert cli.main(["inspect", str(tmp_path / "recipe.yaml"), "0", "--model", str(models / "trained")]) == 0
    out = capsys.readouterr().out
    assert "[assistant, turn 1]two red birds</s>" in out and "weighted sum" in out and "ratio after" in out
    page = tmp_path / "pages" / "row.html"
    assert cli.main(["inspect", str(tmp_path / "recipe.yaml"), "0", "--html", str(page), "--loss.beta", "0.2"]) == 0
    assert "Row 0 of train, as segment_dpo reads it" in page.read_text()


def test_a_row_that_training_would_not_read_is_refused_with_the_reason(models, tmp_path):
    bad = {**ROW, "segments": {"chosen": [0, 1], "rejected": [1]}}
    changed = recipe(models, tmp_path, ROW, bad)
    with pytest.raises(DataError, match=r"rows\.jsonl:2.*unequal_turns"):
        inspect_row(changed, 1)
    with pytest.raises(DataError, match="there is no row 2; rows are counted from 0"):
        inspect_row(changed, 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*turn_lost"):
        inspect_row(changed.replace(max_length=25), 0)


def test_a_recipe_from_scratch_has_no_model_to_compare_with(models, tmp_path):
    changed = recipe(models, tmp_path, ROW).replace(model_name_or_path=None, from_scratch={"model_type": "llama"})
    with pytest.raises(UserError, match="Name the one that training started from"):
        inspect_row(changed, 0, model=str(models / "trained"))
