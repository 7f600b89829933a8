"""A disk that fills up: the run says so with numbers, loses nothing that was whole, and goes on once there is room."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess

import pytest

from prefopt.checkpoints import newest_whole
from tests.faults.points import Spec

SECOND = (("step", 2), ("save", 2))
LAST = (("end", 4), None)
SHORT = {"num_train_epochs": 1, "save_total_limit": 1}
PARTS = 6
ROOMY = 64 * 1024  # KiB


def writes(operations: list[tuple[str, bool]]) -> list[int]:
    """Numbers of the operations that need room."""
    return [number for number, (name, _) in enumerate(operations) if name.startswith(("open", "os.mkdir", "sync"))]


def check(bench, run, ends_exactly, count, window, number, name):
    begin, end = window
    said = bench.interrupted("adapter", run, Spec(str(run), begin, end, "full", number), **SHORT)
    assert re.search(r"error: .*[\d,]+ bytes are free", said), (name, said[-1500:])
    assert "Traceback" not in said, (name, said[-3000:])
    assert newest_whole(run)[0] is not None, name
    count("full disks")
    ends_exactly("adapter", run, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_disk_that_fills_at_any_write_of_a_save(bench, tmp_path, ends_exactly, count, part):
    operations = bench.operations("adapter", Spec("run", *SECOND), **SHORT)
    for number in writes(operations)[part::PARTS]:
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        check(bench, run, ends_exactly, count, SECOND, number, operations[number][0])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_a_disk_that_fills_after_the_last_step(bench, tmp_path, ends_exactly, count, part):
    operations = bench.operations("adapter", Spec("run", *LAST), **SHORT)
    for number in writes(operations)[part::2]:
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        check(bench, run, ends_exactly, count, LAST, number, operations[number][0])


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many KiB, or changes its size; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kib: int) -> None:
        options = f"size={kib}k,remount" if place.is_mount() else f"size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")

    yield place, resize
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_disk_without_room_for_the_checkpoints_is_found_before_the_first_step(bench, small_disk, ends_exactly):
    place, resize = small_disk
    resize(100)
    run = place / "run"
    launch = bench.server.start(bench.command("adapter", run, **SHORT), bench.folder)
    assert launch.end() == [2]
    assert re.search(r"error: .* need [\d,]+ bytes .*and [\d,]+ bytes .* are free", launch.said), launch.said[-1500:]
    assert launch.first.wait_for("step") is None
    resize(ROOMY)
    ends_exactly("adapter", run, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [0, 12, 24, 48, 64])
def test_a_real_disk_that_others_fill_up(bench, small_disk, ends_exactly, count, kib):
    """So much is left of it while the second checkpoint, of about 75 KiB, is written."""
    place, resize = small_disk
    resize(ROOMY)
    run, ballast = place / "run", place / "ballast"
    points = Spec(str(run), *SECOND, "pause", 0)
    launch = bench.server.start(bench.command("adapter", run, **SHORT), bench.folder, points=points)
    launch.first.wait_for("paused")
    ballast.write_bytes(bytes(shutil.disk_usage(place).free - kib * 1024))
    launch.first.signal(signal.SIGCONT)
    assert launch.end() == [2], launch.said[-3000:]
    assert "Traceback" not in launch.said, launch.said[-3000:]
    assert re.search(r"error: .*[\d,]+ bytes are free", launch.said), launch.said[-1500:]
    assert newest_whole(run)[0] == run / "checkpoint-1"
    count("full disks")
    ballast.unlink()
    ends_exactly("adapter", run, **SHORT)
