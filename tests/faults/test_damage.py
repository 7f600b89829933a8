"""A damaged newest checkpoint: it is named, with the file and the reason, and the one before it is gone on from."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt.checkpoints import newest_whole
from tests.faults.points import Spec

FLIPS = 20
PARTS = 4
SEVENTH = ("step", 7)


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit turned over."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


# What becomes of a file's bytes; None removes it, and the bytes of the previous checkpoint's file are given too.
DAMAGE: dict[str, Callable[[bytes, bytes, random.Random], bytes | None]] = {
    "removed": lambda data, older, rng: None,
    "emptied": lambda data, older, rng: b"",
    "cut to 1 %": lambda data, older, rng: data[: len(data) // 100],
    "cut to 50 %": lambda data, older, rng: data[: len(data) // 2],
    "cut to 99 %": lambda data, older, rng: data[: len(data) * 99 // 100],
    "a byte too long": lambda data, older, rng: data + b"\0",
    "that of the checkpoint before": lambda data, older, rng: older,
    "one bit flipped": lambda data, older, rng: flip(data, rng),
}


@pytest.fixture(scope="module")
def killed(bench, tmp_path_factory):
    """A run that was killed after its seventh step, with the checkpoints of steps 5 and 6."""
    run = tmp_path_factory.mktemp("killed") / "run"
    bench.interrupted("adapter", run, Spec(str(run), SEVENTH, None, "kill", 0))
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-5", "checkpoint-6"]
    return run


@pytest.fixture
def run(killed, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def files(run: Path) -> list[Path]:
    """The files of the newest checkpoint."""
    return sorted(path for path in (run / "checkpoint-6").rglob("*") if path.is_file())


def damage(file: Path, kind: str, rng: random.Random) -> bytes:
    """Damage a file of the newest checkpoint; what it held."""
    data = file.read_bytes()
    older = file.parent.with_name("checkpoint-5") / file.name
    new = DAMAGE[kind](data, older.read_bytes(), rng)
    if new is None:
        file.unlink()
    else:
        file.write_bytes(new)
    return data


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_file_damaged_in_each_way_is_found(run, count, kind):
    rng = random.Random(kind)
    for file in files(run):
        for _ in range(FLIPS if "flipped" in kind else 1):
            data = damage(file, kind, rng)
            is_damaged = not file.exists() or file.read_bytes() != data
            found, skipped = newest_whole(run)
            file.write_bytes(data)
            assert found == run / ("checkpoint-5" if is_damaged else "checkpoint-6"), (file.name, kind)
            assert all(file.name in reason or file.name == "manifest.json" for reason in skipped.values())
            count("damage cases", int(is_damaged))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_goes_on_from_the_checkpoint_before(run, killed, ends_exactly, count, part):
    """Each file once, the ways of damage in turn."""
    for number, name in enumerate(file.name for file in files(run)):
        if number % PARTS == part:
            kind = list(DAMAGE)[number % (len(DAMAGE) - 2)]
            shutil.rmtree(run)
            shutil.copytree(killed, run)
            damage(run / "checkpoint-6" / name, kind, random.Random(number))
            said = ends_exactly("adapter", run)
            assert f"passed over checkpoint-6: {name}" in said or name == "manifest.json"
            assert "checkpoint-5\n" in said
            count("damage cases gone on from")


@pytest.mark.slow
def test_when_no_checkpoint_is_whole_the_run_is_refused(bench, run, killed, ends_exactly):
    """A run that has lost all it had is not begun anew without a word; put back, it goes on."""
    for name in ("checkpoint-5", "checkpoint-6"):
        (run / name / "optimizer.pt").unlink()
    launch = bench.start("adapter", run)
    assert launch.end() == [2]
    for name in ("checkpoint-5", "checkpoint-6"):
        assert f"{name}: optimizer.pt is missing" in launch.said
    shutil.copytree(killed / "checkpoint-5", run / "checkpoint-5", dirs_exist_ok=True)
    ends_exactly("adapter", run)
