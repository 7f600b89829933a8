"""A checkpoint is whole if and only if its manifest verifies, and there is always one: after damage, after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt import checkpoints
from prefopt.checkpoints import CUT_OFF, begin, disk_forecast, facts_of, newest_whole, problem, rotate, seal
from prefopt.errors import UserError

FACTS = {"recipe": "12ab", "world_size": 2, "versions": {"torch": "2.9"}}
FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json", "pytorch_model_fsdp_0/__0_0.distcp"]
KILLED = 9


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_files(output: Path, step: int) -> Path:
    """What the Trainer leaves of a save: files of which each differs from step to step, one of them in a folder."""
    folder = output / f"checkpoint-{step}"
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(f"{name} {step}").randbytes(300))
    return folder


def sealed(output: Path, step: int) -> Path:
    folder = write_files(output, step)
    seal(folder, step, FACTS)
    return folder


def save(output: Path, step: int, limit: int | None = None) -> None:
    """The order of a whole save in the trainer."""
    folder = output / f"checkpoint-{step}"
    begin(folder)
    write_files(output, step)
    seal(folder, step, FACTS)
    rotate(output, limit, [], sealed=folder)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def temporary_files(output: Path) -> list[str]:
    """Everything of which the name starts with `_`, but for the shards of a distributed save."""
    return [str(path) for path in output.rglob("_*") if path.suffix != ".distcp"]


# ---- killed at a file operation ---------------------------------------------------------------------------------


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, with no clean-up of any kind, just before its n-th file operation.

    The operations are opening, renaming and removing files, making and removing folders, and syncing. False when the
    action has fewer and so came to its end.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, KILLED)
        return status == KILLED
    try:
        die_at(operation)
        action()
        os._exit(0)
    finally:
        os._exit(1)


def die_at(operation: int) -> None:
    left = operation

    def count(event: str, arguments: object = None) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.fsync"):
            left -= 1
            if left < 0:
                os._exit(KILLED)

    os.fsync = lambda descriptor: count("os.fsync")
    sys.addaudithook(count)


def every_kill(tmp_path: Path, start: Callable[[Path], object], action: Callable[[Path], object]):
    """The output folder after a kill at each file operation of `action` in turn, on top of what `start` made."""
    start(tmp_path / "start")
    for operation in range(1000):
        output = tmp_path / str(operation)
        shutil.copytree(tmp_path / "start", output)
        if not killed_at(operation, lambda output=output: action(output)):
            assert operation > 10, "the kills miss the file operations"
            return
        yield output
    raise AssertionError("the action never ends")


def test_a_kill_anywhere_in_a_save(tmp_path):
    came_through = set()
    for output in every_kill(tmp_path, lambda start: save(start, 1), lambda output: save(output, 2, limit=1)):
        whole, skipped = newest_whole(output)
        assert whole is not None and problem(whole) is None
        assert whole.name == "checkpoint-2" or set(skipped.items()) <= {("checkpoint-2", CUT_OFF)}
        came_through.add(whole.name)
        save(output, 2 if whole.name == "checkpoint-1" else 3, limit=1)  # the resumed run
        assert not temporary_files(output)
        assert newest_whole(output)[1] == {}
        assert len(names(output)) == 1
    assert came_through == {"checkpoint-1", "checkpoint-2"}


def test_a_kill_anywhere_in_the_first_save_is_a_save_that_was_cut_off(tmp_path):
    """Only what was sealed once can be damaged; what never was is no loss, and no reason to refuse a fresh start."""
    for output in every_kill(tmp_path, lambda start: start.mkdir(), lambda output: save(output, 1)):
        whole, skipped = newest_whole(output)
        assert whole is not None or set(skipped.values()) <= {CUT_OFF}


def test_a_kill_anywhere_in_a_save_over_another_run(tmp_path):
    """The files of two runs never lie in one folder, and the old ones are not taken for the new."""
    for output in every_kill(tmp_path, lambda start: save(start, 1), lambda output: save(output, 1)):
        whole, skipped = newest_whole(output)
        assert whole is not None or set(skipped.values()) <= {CUT_OFF}


def test_a_kill_anywhere_in_a_seal_lets_the_next_seal_succeed(tmp_path):
    def start(output: Path) -> None:
        sealed(output, 1)
        write_files(output, 2)

    for output in every_kill(tmp_path, start, lambda output: seal(output / "checkpoint-2", 2, FACTS)):
        newest, _ = newest_whole(output)
        assert newest is not None and newest.name in ("checkpoint-1", "checkpoint-2")
        seal(output / "checkpoint-2", 2, FACTS)
        assert newest_whole(output) == (output / "checkpoint-2", {})
        assert not temporary_files(output)


def test_a_kill_anywhere_in_a_rotation_leaves_the_newest(tmp_path):
    def start(output: Path) -> None:
        for step in (1, 2, 3):
            sealed(output, step)

    for output in every_kill(tmp_path, start, lambda output: rotate(output, 1, [])):
        assert newest_whole(output) == (output / "checkpoint-3", {})
        assert all(problem(folder) is None for folder in output.glob("checkpoint-*")), "half deleted under its name"
        rotate(output, 1, [])
        assert names(output) == ["checkpoint-3"]


def test_a_save_that_overwrites_in_place_is_not_whole_until_it_is_sealed_again(tmp_path):
    folder = sealed(tmp_path, 1)
    (folder / "optimizer.pt").write_bytes(random.Random(0).randbytes(300))
    assert problem(folder) == "optimizer.pt has changed since it was sealed"
    seal(folder, 1, FACTS)
    assert problem(folder) is None


def test_everything_is_on_the_disk_before_the_manifest_takes_its_name(tmp_path, monkeypatch):
    """A power cut, unlike a kill, also loses what was written and not synced."""
    folder = write_files(tmp_path, 1)
    synced: list[int | str] = []
    real_replace = os.replace

    def replace(source: Path, target: Path) -> None:
        synced.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", replace)
    seal(folder, 1, FACTS)
    before, after = synced[: synced.index("replace")], synced[synced.index("replace") + 1 :]
    everything = [folder, *folder.rglob("*")]
    assert set(before) == {path.stat().st_ino for path in everything}
    assert after == [folder.stat().st_ino, tmp_path.stat().st_ino]
    assert before[-1] == folder.stat().st_ino


# ---- damage -----------------------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, previous: Path) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def flip(share: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, previous: Path) -> None:
        content = bytearray(path.read_bytes())
        bit = int(len(content) * 8 * share)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    return damage


def swap(path: Path, previous: Path) -> None:
    shutil.copy(previous, path)


def grow(path: Path, previous: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


DAMAGE = {
    "removed": (lambda path, previous: path.unlink(), "missing"),
    "emptied": (cut(0), "cut off (0 bytes, sealed with 300)"),
    "cut at 1 %": (cut(0.01), "cut off (3 bytes, sealed with 300)"),
    "cut at 50 %": (cut(0.5), "cut off (150 bytes, sealed with 300)"),
    "cut at 99 %": (cut(0.99), "cut off (297 bytes, sealed with 300)"),
    "grown": (grow, "grown (301 bytes, sealed with 300)"),
    "swapped": (swap, "has changed since it was sealed"),
    **{f"bit at {part / 20}": (flip(part / 20), "has changed since it was sealed") for part in range(20)},
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_and_survived(tmp_path, name, kind):
    older, newer = sealed(tmp_path, 5), sealed(tmp_path, 10)
    damage, reason = DAMAGE[kind]
    damage(newer / name, older / name)
    whole, skipped = newest_whole(tmp_path)
    assert whole == older and list(skipped) == ["checkpoint-10"]
    assert skipped["checkpoint-10"].startswith(f"{name} ") and skipped["checkpoint-10"].endswith(reason)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_manifest_is_found(tmp_path, kind):
    older, newer = sealed(tmp_path, 5), sealed(tmp_path, 10)
    DAMAGE[kind][0](newer / "manifest.json", older / "manifest.json")
    reason = {"removed": "not sealed", "swapped": "manifest.json is that of step 5"}.get(kind)
    assert newest_whole(tmp_path) == (older, {"checkpoint-10": reason or "manifest.json is damaged"})


def test_every_bit_of_a_manifest_counts(tmp_path):
    folder = sealed(tmp_path, 5)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for bit in random.Random(0).sample(range(len(whole) * 8), 100):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(content)
        assert problem(folder) == "manifest.json is damaged", bit


def test_a_manifest_nobody_here_wrote_is_a_reason_and_no_crash(tmp_path):
    folder = sealed(tmp_path, 5)
    body = json.loads((folder / "manifest.json").read_text())
    del body["seal"]
    strange = [{}, {**body, "files": []}, {**body, "files": {"a": 1}}, {**body, "step": "x"}, {**body, "facts": 1}]
    for manifest in strange:
        (folder / "manifest.json").write_text(checkpoints._render(manifest))
        assert problem(folder) == "manifest.json is damaged"
    (folder / "manifest.json").write_text(checkpoints._render({**body, "version": 2}))
    assert problem(folder) == "manifest.json has version 2, and this prefopt reads version 1"
    for text in ["[]", "null", "[" * 100_000, '{"seal": NaN}', "\xff"]:
        (folder / "manifest.json").write_text(text)
        assert problem(folder) == "manifest.json is damaged"


def test_a_manifest_that_cannot_be_read_is_a_reason_too(tmp_path):
    folder = sealed(tmp_path, 5)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert problem(folder) == "manifest.json cannot be read (Is a directory)"


@pytest.mark.parametrize("stray", ["rng_state_3.pth", "model-00002-of-00002.safetensors", "global_step4/mp_rank.pt"])
def test_a_file_too_many_that_a_load_would_take(tmp_path, stray):
    folder = sealed(tmp_path, 5)
    (folder / stray).parent.mkdir(exist_ok=True)
    (folder / stray).write_bytes(b"of another run")
    assert problem(folder) == f"{stray} was not there when it was sealed"


def test_notes_markers_and_temporary_names_do_no_harm(tmp_path):
    folder = write_files(tmp_path, 5)
    marker = folder / "checkpoint-is-incomplete.txt"
    marker.write_text("in progress")
    (folder / "_draft.bin").write_text("gone soon")
    seal(folder, 5, FACTS)
    assert problem(folder) is None
    marker.unlink()
    (folder / "_draft.bin").unlink()
    (folder / "notes.txt").write_text("the good one")
    (folder / "all_results.json").write_text("{}")
    assert problem(folder) is None


# ---- choosing ---------------------------------------------------------------------------------------------------


def test_the_highest_step_by_number_and_exact_names(tmp_path):
    for step in (9, 10):
        sealed(tmp_path, step)
    for name in ("checkpoint-11-old", "checkpoint-12.bak", "xcheckpoint-13", "checkpoint-", "checkpoint-٣"):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / name)
    (tmp_path / "checkpoint-14").write_text("a file")
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-10", {})
    assert rotate(tmp_path, 1, []) == [tmp_path / "checkpoint-9"]
    assert (tmp_path / "checkpoint-11-old").is_dir()


def test_a_renamed_copy_is_not_a_later_step(tmp_path):
    shutil.copytree(sealed(tmp_path, 5), tmp_path / "checkpoint-50")
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "best")
    assert newest_whole(tmp_path)[1] == {"checkpoint-50": "manifest.json is that of step 5"}
    assert problem(tmp_path / "best") is None


def test_no_checkpoint_at_all(tmp_path):
    assert newest_whole(tmp_path) == (None, {})
    assert newest_whole(tmp_path / "not there yet") == (None, {})
    assert rotate(tmp_path / "not there yet", 1, []) == []
    (tmp_path / "checkpoint-1").mkdir()
    assert newest_whole(tmp_path) == (None, {"checkpoint-1": CUT_OFF})
    write_files(tmp_path, 1)
    assert newest_whole(tmp_path) == (None, {"checkpoint-1": "not sealed"})


def test_more_may_be_asked_of_a_checkpoint_than_to_be_whole(tmp_path):
    for step in (1, 2):
        sealed(tmp_path, step)
    found = newest_whole(tmp_path, lambda folder: "too late" if folder.name == "checkpoint-2" else problem(folder))
    assert found == (tmp_path / "checkpoint-1", {"checkpoint-2": "too late"})


def test_the_facts_come_back(tmp_path):
    folder = write_files(tmp_path, 5)
    seal(folder, 5, {**FACTS, "by rank": {2: "b", 10: "a"}, "name": "é", "share": 0.1, "empty": (), "none": None})
    assert problem(folder) is None
    assert facts_of(folder) == {
        **FACTS, "by rank": {"2": "b", "10": "a"}, "name": "é", "share": 0.1, "empty": [], "none": None,
    }  # fmt: skip
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="checkpoint-5: not sealed"):
        facts_of(folder)


# ---- deleting ---------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        sealed(tmp_path, step)
    assert rotate(tmp_path, None, []) == rotate(tmp_path, 0, []) == rotate(tmp_path, 5, []) == []
    elsewhere = Path("moved") / "checkpoint-1"  # as an earlier place of the run recorded it
    assert [path.name for path in rotate(tmp_path, 3, [elsewhere])] == ["checkpoint-2", "checkpoint-3"]
    assert [path.name for path in rotate(tmp_path, 1, [elsewhere])] == ["checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5"]


def test_rotation_deletes_first_what_is_not_whole(tmp_path):
    for step in (1, 2, 3, 4, 5):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    assert [path.name for path in rotate(tmp_path, 4, [])] == ["checkpoint-2"]
    assert [path.name for path in rotate(tmp_path, 3, [])] == ["checkpoint-4"]
    assert [path.name for path in rotate(tmp_path, 2, [])] == ["checkpoint-1"]


def test_rotation_keeps_the_one_just_sealed_and_reads_it_no_second_time(tmp_path, monkeypatch):
    """It need not have the highest step: the run may have gone back to an earlier one."""
    for step in (1, 2, 3, 4):
        sealed(tmp_path, step)
    read: list[str] = []
    stock = checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", lambda path: read.append(path.parent.name) or stock(path))
    rotate(tmp_path, 3, [], sealed=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"] and "checkpoint-1" not in read
    read.clear()
    rotate(tmp_path, 1, [], sealed=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4"] and not read


def test_rotation_protects_the_newest_that_verifies_in_full(tmp_path):
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    flip(0.5)(tmp_path / "checkpoint-3" / "model.safetensors", tmp_path)
    rotate(tmp_path, 1, [])
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_nothing_is_deleted_while_nothing_is_whole(tmp_path):
    for step in (1, 2, 3):
        write_files(tmp_path, step)
    assert rotate(tmp_path, 1, []) == []
    assert len(names(tmp_path)) == 3


def test_trash_of_a_kill_is_swept_and_nothing_else(tmp_path):
    sealed(tmp_path, 2)
    for name in ("_trash-checkpoint-1", "_trash-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    rotate(tmp_path, None, [])
    assert names(tmp_path) == ["_trash-notes", "checkpoint-2"]


def test_a_save_begins_in_an_empty_folder(tmp_path):
    """Files of another world size, or of another run, would be sealed in with the new ones."""
    for start in (write_files, sealed):
        folder = start(tmp_path, 2)
        (folder / "rng_state_3.pth").write_text("of another world size")
        begin(folder)
        assert names(folder) == ["manifest.json"] and problem(folder) == CUT_OFF
        write_files(tmp_path, 2)
        assert problem(folder) == CUT_OFF
        seal(folder, 2, FACTS)
        assert problem(folder) is None


def test_a_save_begins_over_the_trash_of_an_earlier_try(tmp_path):
    write_files(tmp_path, 2).rename(tmp_path / "_trash-checkpoint-2")
    write_files(tmp_path, 2)
    begin(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2"]


# ---- the disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gigabyte_free(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if Path(path).exists() else pytest.fail(str(path)))


@pytest.mark.parametrize(
    ("size", "limit", "saves", "refused"),
    [
        (333_000_000, 2, None, False),  # two, and the third before the first goes
        (334_000_000, 2, None, True),
        (334_000_000, 2, 2, False),
        (999_999_999, None, None, False),
        (1_000_000_001, None, None, True),
        (100_000_001, None, 10, True),
        (100_000_000, None, 10, False),
        (1_000_000_001, 3, 0, False),
    ],
)
def test_the_forecast_counts_what_will_lie_there_at_once(tmp_path, gigabyte_free, size, limit, saves, refused):
    output = tmp_path / "runs" / "not made yet"
    if not refused:
        disk_forecast(output, size, limit, saves)
        return
    with pytest.raises(UserError, match=r"1,000,000,000 bytes \(1\.0 GB\) are free") as error:
        disk_forecast(output, size, limit, saves)
    needed = size * (limit + 1 if limit else saves or 1)
    assert f"{needed:,} bytes" in str(error.value) and str(output) in str(error.value)


def test_the_forecast_counts_what_is_there_as_written(tmp_path, gigabyte_free):
    with pytest.raises(UserError, match="3 more checkpoints of"):
        disk_forecast(tmp_path, 900_000_000, 2)
    sealed(tmp_path, 1)
    with pytest.raises(UserError, match="2 more checkpoints of"):
        disk_forecast(tmp_path, 900_000_000, 2)
    for step in (2, 3, 4, 5):
        sealed(tmp_path, step)
    disk_forecast(tmp_path, 900_000_000, 2)
