"""Kept token ids are those the tokenizer would give now, or they are not used; nothing else about a run changes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import normalizers

from prefopt import token_cache
from prefopt.config import PreferenceConfig
from prefopt.data import drafting, drafts, tokenization
from prefopt.data.drafts import Drafter, DraftSettings, content_id
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.errors import DataError, UserError
from prefopt.ranks import first_on_machine
from prefopt.reference.store import Entry, Store
from tests.data.test_tokenization import chat_pair, examples_of
from tests.helpers import make_tokenizer, text_pairs
from tests.reference.stores import in_child, status, without_syncs

ROWS = [
    chat_pair(f"{index} {row['prompt']}", row["chosen"], row["rejected"]) for index, row in enumerate(text_pairs(40))
]
COUNT = len(ROWS)


@pytest.fixture(autouse=True)
def many_rows_are_few(monkeypatch):
    for module in (drafting, tokenization):
        monkeypatch.setattr(module, "CHUNK", 7)
    without_syncs(monkeypatch)


@pytest.fixture
def made(monkeypatch):
    """How many drafts each call made; those that are made to check the cache are in the first call of a run."""
    counts, stock = [], Drafter.drafts
    monkeypatch.setattr(Drafter, "drafts", lambda self, rows: counts.append(len(rows)) or stock(self, rows))
    return counts


def prepared(folder, rows=ROWS, tokenizer=None, **settings):
    """Token rows and report with the cache in `folder`, or without one when it is None."""
    tokenizer = tokenizer or make_tokenizer()
    args = PreferenceConfig(output_dir="unused", token_cache="never" if folder is None else str(folder))
    data = tokenize_examples(
        rows if hasattr(rows[0], "where") else examples_of(rows),
        tokenizer,
        TokenSettings(**{"max_length": 20, "max_dropped": 1, **settings}),
        open_cache=partial(token_cache.open_cache, tokenizer, args),
    )
    flat = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in data.rows]
    return flat, data.report.as_dict()


def test_a_second_run_finds_what_the_first_one_made(tmp_path, made):
    cold = prepared(tmp_path)
    assert sum(made) == COUNT
    made.clear()
    assert prepared(tmp_path) == cold == prepared(None)
    assert made[0] == drafting._CHECKED and sum(made[1:]) == COUNT, "and the run without a cache makes them all"
    assert cold[1]["noted"], "rows that are cut have to be counted alike"


def test_a_few_rows_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "CHUNK", COUNT + 1)
    prepared(tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


HARMLESS = {
    "a limit": {"max_length": 12},
    "what is cut": {"truncation_mode": "keep_end", "min_prompt_tokens": 3},
    "rows to drop": {"cut_answers": "drop"},
    "order": {"rows": ROWS[::-1]},
    "other columns": {"rows": [{**row, "score_chosen": 1.0} for row in ROWS]},
    "fewer rows": {"rows": ROWS[5:30]},
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_ids_costs_nothing(tmp_path, made, change):
    prepared(tmp_path)
    made.clear()
    warm = prepared(tmp_path, **HARMLESS[change])
    assert sum(made) == drafting._CHECKED
    assert warm == prepared(None, **HARMLESS[change])


def test_more_rows_are_made_alone(tmp_path, made):
    prepared(tmp_path, ROWS[:30])
    made.clear()
    assert prepared(tmp_path) == prepared(None)
    assert sum(made) - COUNT - made[0] == 10 and made[0] < drafting._CHECKED


def test_a_character_of_one_row(tmp_path, made):
    prepared(tmp_path)
    rows = [dict(row) for row in ROWS]
    rows[3] = chat_pair("3 " + rows[3]["prompt"][0]["content"], "Now", "then")
    made.clear()
    assert prepared(tmp_path, rows) == prepared(None, rows)
    assert sum(made[1:]) == 1 + COUNT


def test_a_tokenizer_that_was_used_for_something_else_is_the_same(tmp_path, made):
    prepared(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer(["a", "the cat sat"], padding="max_length", max_length=3, truncation=True)
    made.clear()
    prepared(tmp_path, tokenizer=tokenizer)
    assert sum(made) == drafting._CHECKED


def with_token(tokenizer):
    tokenizer.add_tokens(["cat sat"])


def with_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|' +", "'<| ' +")


def with_other_end(tokenizer):
    tokenizer.eos_token = "<|tool|>"


def with_split_markers(tokenizer):
    tokenizer.split_special_tokens = True


def with_a_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("cat", "dog")


def of_another_class(tokenizer):
    class Other(type(tokenizer)):
        def __call__(self, texts, **kwargs):
            return super().__call__([text.replace("cat", "dog") for text in texts], **kwargs)

    Other.__qualname__ = type(tokenizer).__qualname__
    tokenizer.__class__ = Other


@pytest.mark.parametrize(
    "change", [with_token, with_template, with_other_end, with_split_markers, with_a_normalizer, of_another_class]
)
def test_another_tokenizer_takes_nothing_from_this_one(tmp_path, made, change):
    prepared(tmp_path)
    tokenizer = make_tokenizer()
    change(tokenizer)
    made.clear()
    ours = prepared(tmp_path, tokenizer=tokenizer, max_length=None)
    assert sum(made) == COUNT
    assert ours == prepared(None, tokenizer=tokenizer, max_length=None) != prepared(None, max_length=None)


@pytest.mark.parametrize(
    "settings", [{"prompt_boundary": "common_prefix"}, {"chat_template_kwargs": {"thinking": True}}]
)
def test_settings_of_the_ids_have_an_entry_of_their_own(tmp_path, made, settings):
    prepared(tmp_path)
    made.clear()
    prepared(tmp_path, **settings)
    assert sum(made) == COUNT


def test_each_part_of_the_identity_counts(monkeypatch, tmp_path):
    def key(**changes):
        return token_cache.identity(make_tokenizer(), DraftSettings(**changes))

    before = key()
    assert before == key()
    assert key(targets=True) != before
    other = tmp_path / "drafts.py"
    other.write_text("# another version")
    monkeypatch.setattr(drafts, "__file__", str(other))
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(token_cache.tokenizers, "__version__", "0.0.1")
    assert key() != before


def test_a_template_that_writes_the_date_has_an_entry_a_day(monkeypatch):
    tokenizer = make_tokenizer()
    assert token_cache.identity(tokenizer, DraftSettings())["date"] is None
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    assert token_cache.identity(tokenizer, DraftSettings())["date"] == token_cache.date.today().isoformat()


@pytest.mark.slow
def test_another_process_finds_the_same_entry(tmp_path):
    code = (
        "from prefopt import token_cache; from prefopt.data.drafts import DraftSettings; "
        "from prefopt.reference.hashing import hash_json; from tests.helpers import make_tokenizer; "
        "print(hash_json(token_cache.identity(make_tokenizer(), DraftSettings())))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(keys) == 1


def entry_file(folder: Path) -> Path:
    (path,) = folder.glob("tokens-*.sqlite")
    return path


def flip_a_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        number, data = db.execute("SELECT rowid, data FROM rows LIMIT 1 OFFSET 20").fetchone()
        db.execute("UPDATE rows SET data = ? WHERE rowid = ?", (bytes([data[0] ^ 1]) + data[1:], number))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip_a_row, cut, empty, make_a_folder])
def test_damage_is_said_and_mended(tmp_path, capsys, made, damage):
    cold = prepared(tmp_path)
    damage(entry_file(tmp_path))
    assert prepared(tmp_path) == cold
    assert "damaged" in capsys.readouterr().out
    prepared(tmp_path)
    made.clear()
    assert prepared(tmp_path) == cold
    assert sum(made) == drafting._CHECKED and "damaged" not in capsys.readouterr().out


def test_ids_that_the_tokenizer_would_not_give_are_not_believed(tmp_path, capsys):
    cold = prepared(tmp_path)
    key = entry_file(tmp_path)
    entry = Store(tmp_path).entries()[0]
    ids = [content_id(example, False) for example in examples_of(ROWS)]
    other = Entry(Store(tmp_path), entry.key, entry.about, token_cache.KIND)
    other.write({ids[-1]: np.array([0, 2, 1, 1, 1, 5, 6, 7], np.int32)})
    assert prepared(tmp_path) == cold
    assert f"{key} has other ids than this tokenizer gives" in capsys.readouterr().out


def test_a_place_that_cannot_be_used_costs_a_line_and_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prepared(tmp_path / "file") == prepared(None)
    assert "token cache: not used" in capsys.readouterr().out


def test_a_disk_that_fills_up_costs_a_line_and_no_run(tmp_path, capsys, monkeypatch, made):
    writes, stock = [], Entry.write

    def write(self, rows):
        writes.append(len(rows))
        if len(writes) > 2:
            raise UserError("the disk is full")
        stock(self, rows)

    monkeypatch.setattr(Entry, "write", write)
    assert prepared(tmp_path) == prepared(None)
    assert sum(made) == 3 * 7 + COUNT + COUNT, "what could not be kept is given up at once"
    assert len(writes) == 3 and capsys.readouterr().out.count("the disk is full") == 1


def test_a_tokenizer_that_cannot_be_saved_costs_a_line_and_no_run(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained = None
    assert prepared(tmp_path, tokenizer=tokenizer) == prepared(None)
    assert "cannot be saved" in capsys.readouterr().out


def test_a_bad_row_is_refused_again_when_its_ids_are_kept(tmp_path, made):
    rows = text_pairs(COUNT)
    rows[30]["prompt"] = "<s>" + rows[30]["prompt"]
    tokenizer = make_tokenizer(adds_bos=True)
    for _ in range(2):
        made.clear()
        with pytest.raises(DataError, match=r"rows.jsonl:31, prompt: two beginning-of-sequence tokens"):
            prepared(tmp_path, rows, tokenizer)
    assert sum(made) == drafting._CHECKED


def test_two_runs_at_once(tmp_path):
    cold = prepared(None)

    def run():
        assert prepared(tmp_path) == cold

    children = [in_child(run) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]


def test_the_cache_lies_beside_the_reference_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    for reference, place in ((None, "store"), ({"store": str(tmp_path / "own")}, "own")):
        args = PreferenceConfig(output_dir="unused", reference=reference)
        cache = token_cache.open_cache(make_tokenizer(), args, DraftSettings())
        assert cache._entry.path.parent == tmp_path / place
    (entry,) = Store(tmp_path / "own").entries()
    assert entry.kind == "tokens" and entry.damaged is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_process_of_a_machine_lets_the_others_on_also_when_it_fails(monkeypatch, fails):
    events = []

    for first in (True, False):
        state = SimpleNamespace(is_local_main_process=first, wait_for_everyone=lambda: events.append("wait"))
        monkeypatch.setattr("prefopt.ranks.PartialState", lambda state=state: state)
        try:
            with first_on_machine() as mine:
                events.append(mine)
                if fails:
                    raise DataError("bad row")
        except DataError:
            events.append("failed")
    after = ["failed"] if fails else []
    assert events == [True, "wait", *after, "wait", False, *after]
