"""Drafts are the same by any number of processes, and worker processes end with their work or their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from prefopt.data import drafting
from prefopt.data.drafting import CHUNK, process_count
from prefopt.data.drafts import EOS_APPENDED, PROMPT_NOT_PREFIX, Draft, Drafter, content_id
from prefopt.data.tokenization import TokenSettings, tokenize_examples
from prefopt.data.truncation import Answer
from prefopt.errors import DataError, UserError
from tests.data.test_tokenization import chat_pair, examples_of
from tests.helpers import make_tokenizer, text_pairs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(drafting, "CHUNK", 7)


def draft(prompt, *answers, notes=()):
    made = (Answer(np.array(ids, np.int32), np.array(scored, bool)) for ids, scored in answers)
    return Draft(np.array(prompt, np.int32), tuple(made), notes)


@pytest.mark.parametrize(
    "made",
    [
        draft([1, 5], ([3, 0], [True, True]), ([0, 4, 2], [False, True, False])),
        draft([], ([2], [True])),
        draft([7], ([0], [False]), ([], []), ([2**31 - 1], [False]), notes=(EOS_APPENDED,)),
        draft([7], ([9], [True]), notes=(PROMPT_NOT_PREFIX, EOS_APPENDED)),
    ],
)
def test_a_packed_draft_comes_back(made):
    packed = made.pack()
    found = Draft.unpack(packed)
    packed[:] = -9  # the draft keeps nothing of it
    assert found.notes == made.notes and len(found.answers) == len(made.answers)
    flat = [[made.prompt, *chain.from_iterable(made.answers)] for made in (found, made)]
    for ours, theirs in zip(*flat, strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and ours.flags.writeable


def told(rows, **how):
    """Everything that tokenisation gives, in a form that can be compared."""
    data = tokenize_examples(examples_of(rows), make_tokenizer(), TokenSettings(max_length=12, max_dropped=1), **how)
    flat = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in data.rows]
    return flat, data.report.as_dict(), list(data.report.noted)


CHATS = [chat_pair(row["prompt"], row["chosen"], row["rejected"]) for row in text_pairs(30, seed=1)]


@pytest.mark.parametrize("rows", [text_pairs(30), CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_nothing(rows, processes):
    one = told(rows)
    assert told(rows, processes=processes) == one
    assert one[1]["noted"], "rows that are cut have to be counted alike"


def test_the_first_bad_row_is_refused_by_any_number_of_processes():
    rows = [dict(row) for row in CHATS]
    for bad in (9, 25):
        rows[bad]["prompt"] = [{"role": "user", "content": "refuse me"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'refuse me' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    said = []
    for processes in (1, 3):
        with pytest.raises(DataError) as refused:
            tokenize_examples(examples_of(rows), tokenizer, TokenSettings(), processes=processes)
        said.append(str(refused.value))
    assert said[0] == said[1] and said[0].startswith("rows.jsonl:10, prompt:")


def test_a_worker_that_dies_is_no_riddle(monkeypatch):
    monkeypatch.setattr(Drafter, "drafts", lambda self, examples: os._exit(9))
    with pytest.raises(UserError, match="dataset_num_proc: 1"):
        told(text_pairs(30), processes=2)
    assert not multiprocessing.active_children()


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path, monkeypatch):
    def sleep(self, examples):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    monkeypatch.setattr(Drafter, "drafts", sleep)
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=told, args=(text_pairs(30),), kwargs={"processes": 2})
    parent.start()
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert parent.pid not in workers
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    assert wait_until(lambda: not any(map(alive, workers)))


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    told(text_pairs(30), processes=2)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_as_many_processes_as_pay(monkeypatch):
    monkeypatch.setattr(drafting, "CHUNK", CHUNK)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert [process_count(None, rows) for rows in (1, 3999, 4000, 9000, 10**6)] == [1, 1, 2, 4, 8]
    assert [process_count(3, rows) for rows in (1, 1001, 10**6)] == [1, 2, 3], "no more than there are chunks"
    monkeypatch.setattr("sys.platform", "darwin")
    assert process_count(None, 10**6) == 1 and process_count(4, 10**6) == 4


def test_what_a_draft_reads_is_what_it_is_found_by():
    (example,) = examples_of([chat_pair("hi", "yes", "no", target=chat_pair("", "t", "")["chosen"], score_chosen=1.0)])
    same = examples_of([chat_pair("hi", "yes", "no", target=chat_pair("", "t", "")["chosen"], score_chosen=2.0)])[0]
    assert content_id(same, True) == content_id(example, True), "scores change no ids"
    tools = [{"name": "a", "type": "b"}], [{"type": "b", "name": "a"}]
    others = [
        chat_pair("hi", "yes", "No"),
        chat_pair("ho", "yes", "no"),
        chat_pair("hi", "no", "yes"),
        *(chat_pair("hi", "yes", "no", tools=each) for each in tools),
        chat_pair("hi", "yes", "no", chat_template_kwargs={"thinking": True}),
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "completion": "yes", "label": True},
    ]
    ids = [content_id(other, False) for other in (examples_of([row])[0] for row in others)]
    ids += [content_id(example, False), content_id(example, True)]
    assert len(set(ids)) == len(others) + 2
