"""One push against the stand-in: a single commit or none, each object once over the wire, and reasons in a line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from prefopt.errors import UserError
from prefopt.hub import sending
from prefopt.hub.sending import Destination, send, why
from tests.hub.server import TOKEN, Hub
from tests.hub.wire import Refusal

MODEL = {"config.json": b"{}", "a.safetensors": b"first shard", "b.safetensors": b"second shard", "c.bin": b"third"}
HERE = Destination("me/model")


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def push(files=MODEL, destination: Destination = HERE):
    return send(files, destination, "a push")


def failure(destination: Destination = HERE, files=MODEL) -> str:
    with pytest.raises(Exception) as raised:
        push(files, destination)
    return why(raised.value, destination)


def test_a_push_is_one_commit_of_exactly_its_files(hub):
    sent = push()
    assert hub.files("me/model") == MODEL
    assert hub.commits("me/model") == ["a push"]
    assert sent.files == {name: sha(content) for name, content in MODEL.items()}
    assert (sent.repo, sent.bytes) == ("me/model", sum(map(len, MODEL.values())))
    assert sent.oid == hub.repositories["me/model"].branches["main"][-1][0]
    assert sent.oid in sent.commit_url


def test_what_arrives_can_be_downloaded(hub, tmp_path):
    push()
    folder = Path(snapshot_download("me/model", local_dir=tmp_path / "copy", endpoint=hub.url))
    assert {name: (folder / name).read_bytes() for name in MODEL} == MODEL


def test_pushing_again_sends_what_changed_and_nothing_makes_no_commit(hub):
    push()
    before = list(hub.stored)
    again = push()
    assert hub.commits("me/model") == ["a push"]
    assert again.oid == hub.repositories["me/model"].branches["main"][-1][0]
    push({**MODEL, "b.safetensors": b"trained on"})
    assert hub.stored == [*before, sha(b"trained on")]


def test_the_same_bytes_under_two_names_travel_once(hub):
    push({**MODEL, "last-checkpoint/a.safetensors": MODEL["a.safetensors"]})
    assert hub.stored.count(sha(MODEL["a.safetensors"])) == 1
    assert hub.files("me/model")["last-checkpoint/a.safetensors"] == MODEL["a.safetensors"]


def test_weights_of_another_shape_do_not_stay_beside_new_ones(hub):
    push({"model.safetensors": b"whole", "LICENSE": b"mine"})
    sent = push({"model-00001-of-00001.safetensors": b"shard", "model.safetensors.index.json": b"{}"})
    assert sorted(hub.files("me/model")) == [
        "LICENSE", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert sent.removed == ["model.safetensors"]


def test_a_bare_name_goes_to_ones_own_namespace_and_the_card_says_so(hub):
    card = b'---\ntags:\n- x\n---\n\n# model\n\npipeline(model="model")  # "model"\n'
    assert push({**MODEL, "README.md": card}, Destination("model")).repo == "me/model"
    assert hub.files("me/model")["README.md"].decode().endswith('# me/model\n\npipeline(model="me/model")  # "model"\n')


def test_private_and_branch(hub):
    push(destination=Destination("me/model", private=True, revision="run-2"))
    assert hub.repositories["me/model"].private
    assert hub.files("me/model", "run-2") == MODEL
    assert hub.files("me/model") == {}
    push({**MODEL, "config.json": b"{ }"}, Destination("me/model", revision="run-2"))  # the branch is there already
    assert len(hub.commits("me/model", "run-2")) == 2


# Faults

PASSING = {
    "making the repository": ("create", 503),
    "the tree": ("tree", 500),
    "preparing": ("preupload", 500),
    "the batch": ("batch", 502),
    "an upload": ("upload", 500),
    "a broken connection": ("upload", "cut"),
    "the card's check": ("yaml", 502),
    "the commit": ("commit", 504),
    "a broken commit": ("commit", "cut"),
    "too many requests": ("preupload", 429),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(hub, fault):
    hub.fail(*PASSING[fault])
    push({**MODEL, "README.md": b"---\n---\n"})
    assert len(hub.files("me/model")) == 5
    assert len(hub.commits("me/model")) == 1


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_leaves_the_repository_as_it_was_and_a_retry_sends_the_rest(hub, fault):
    push({"config.json": b"old", "a.safetensors": b"old shard"})
    old, stored = hub.files("me/model"), len(hub.stored)
    route, kind = PASSING[fault]
    hub.fail(route, for_ever=kind)
    files = {**MODEL, "README.md": b"---\n---\n"}
    with pytest.raises(Exception):  # noqa: B017
        push(files)
    assert hub.files("me/model") == old
    hub.faults.clear()
    push(files)
    assert hub.files("me/model") == files
    new = hub.stored[stored:]
    assert sorted(new) == sorted(sha(content) for name, content in MODEL.items() if name != "config.json")


def test_an_upload_cut_off_in_the_middle_goes_on_with_the_rest(hub, monkeypatch):
    hub.fail("upload", None, for_ever=500)  # the first object arrives
    with pytest.raises(RuntimeError):
        push()
    arrived = list(hub.stored)
    assert 1 <= len(arrived) < 3
    hub.faults.clear()
    push()
    assert sorted(hub.stored) == sorted(sha(content) for name, content in MODEL.items() if name != "config.json")
    assert hub.stored[: len(arrived)] == arrived


REASONS = {
    "an expired token": (lambda hub: hub.tokens.clear(), "the Hub refuses the token (401)"),
    "no right to write": (lambda hub: setattr(hub, "may_write", False), "the token may not write to me/model (403)"),
    "a failing Hub": (lambda hub: hub.fail("commit", for_ever=500), "the Hub answered 500"),
    "a failing store": (lambda hub: hub.fail("upload", for_ever=503), "the Hub answered 503"),
    "wrong bytes": (
        lambda hub: hub.fail("upload", for_ever="hash"),
        "the Hub answered 422: the content does not have this hash",
    ),
    "no such branch": (
        lambda hub: hub.fail("preupload", for_ever=404),
        "the Hub does not find me/model or its branch (404)",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_are_one_line(hub, case):
    break_it, reason = REASONS[case]
    push({"config.json": b"old"})
    break_it(hub)
    line = failure()
    assert reason in line
    assert "\n" not in line
    assert len(line) < 300
    assert hub.files("me/model") == {"config.json": b"old"}


def test_nobody_is_there(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in failure()


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert failure() == "offline mode is on (HF_HUB_OFFLINE)"
    assert hub.requests == []


@pytest.mark.parametrize("route", ["create", "preupload", "commit"])
def test_a_hub_that_falls_silent_is_given_up(hub, monkeypatch, route):
    monkeypatch.setattr(sending, "SILENCE", 0.1)
    hub.fail(route, for_ever=("wait", 1.0))
    assert "ReadTimeout" in failure()


def test_a_card_the_hub_refuses_is_named_with_the_reason(hub):
    assert "Invalid metadata in README.md. - no metadata" in failure(files={**MODEL, "README.md": b"# no header\n"})
    assert hub.stored == []


# Tokens


def test_a_file_with_a_token_is_never_sent(hub):
    hub_sees = len(hub.requests)
    with pytest.raises(UserError, match=r"config\.json holds an access token"):
        push({**MODEL, "config.json": f'{{"note": "{TOKEN}"}}'.encode()})
    assert len(hub.requests) == hub_sees


def test_a_token_given_by_hand_is_used_and_shown_nowhere(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.tokens = {"another-token"}
    destination = Destination("me/model", token="another-token")
    assert "another" not in repr(destination)
    assert "another" not in destination.command(Path("runs/x"))
    push(destination=destination)
    assert hub.files("me/model") == MODEL
    assert why(ValueError("Bearer another-token"), destination) == "ValueError: Bearer (removed)"
    assert not any(b"another-token" in request.body for request in hub.requests)


def test_the_command_says_all_that_is_needed():
    destination = Destination("me/my model", private=True, revision="b")
    expected = "prefopt push 'runs/a b' --repo 'me/my model' --private --revision b"
    assert destination.command(Path("runs/a b")) == expected


def test_the_stand_in_refuses_a_commit_of_what_was_not_uploaded(hub: Hub):
    """A stand-in that accepts everything would prove nothing."""
    push()
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": {"path": "d", "oid": sha(b"d")}}]
    with pytest.raises(Refusal, match="d was not uploaded"):
        hub.commit(repo="me/model", revision="main", body="\n".join(map(json.dumps, lines)).encode())
    with pytest.raises(Refusal, match="does not have this hash"):
        hub.upload(oid=sha(b"d"), body=b"e")
