"""Peaks are those of the work alone, in a process that starts with nothing."""

from __future__ import annotations

import sys

import pytest
import torch

from prefopt.benchmark.memory import peak_of
from tests.benchmark import parts

SLACK = 40 * parts.MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how much is held now")
def test_a_peak_is_what_the_work_held_at_most():
    here = torch.ones(300 * parts.MIB // 4)  # of this process, which the other must not count
    peak = peak_of(parts.hold, 200)
    assert peak.added == pytest.approx(200 * parts.MIB, abs=SLACK)
    assert here.sum() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_what_work_makes_before_it_yields_does_not_count_and_it_has_the_threads_asked_for():
    assert peak_of(parts.hold_more, 200, 50, threads=2).added == pytest.approx(50 * parts.MIB, abs=SLACK)
