"""Fixtures of the fault tests, and the table of what they did."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.bench import Bench
from tests.faults.launch import fork_server

COUNTED = "faults: "
STARTED = time.monotonic()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Model, data, and the fork server that trains on them."""
    if sys.platform != "linux":
        pytest.skip("needs what Linux says of a process and its files")
    with fork_server() as server:
        yield Bench(tmp_path_factory.mktemp("faults"), server)


@pytest.fixture
def count(record_property: Any) -> Any:
    """`count(name, number)`: add to a line of the table."""

    def add(name: str, number: int = 1) -> None:
        record_property(COUNTED + name, number)

    return add


@pytest.fixture
def ends_exactly(bench: Bench, count: Any) -> Any:
    """Give the same command again: it must succeed and end with the bits of the undisturbed run; what it said."""

    def check(case: str, run: Any, ranks: int = 1, **settings: Any) -> str:
        launch = bench.start(case, run, ranks, **settings)
        statuses = launch.end()
        count("resumes")
        count("failed resumes", int(statuses != [0] * ranks))
        assert statuses == [0] * ranks, f"{statuses}: {launch.said[-3000:]}"
        differences = bench.differences(case, run, ranks, **settings)
        count("mismatches", int(bool(differences)))
        assert not differences, launch.said[-3000:]
        return launch.said

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the sums; they travel with the reports, so they are right with several workers too."""
    sums: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            for name, number in report.user_properties:
                if name.startswith(COUNTED):
                    sums[name.removeprefix(COUNTED)] += number
    if sums:
        sums["seconds"] = round(time.monotonic() - STARTED)
        terminalreporter.section("faults")
        for name in sorted(sums):
            terminalreporter.write_line(f"{name:30} {sums[name]:6}")
