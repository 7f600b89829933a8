"""Tables, JSON and plots of a report."""

from __future__ import annotations

import json

from prefopt.benchmark.output import Chart, Report, Table
from prefopt.benchmark.timing import Spread

TABLE = Table(
    "Rates",
    [{"way": "a", "pairs/s": Spread(2.0, 1.0, 3.0), "tokens": 12345}, {"way": "b", "pairs/s": None, "tokens": 0}],
)


def test_a_table_is_aligned_and_reads_as_numbers_do():
    assert str(TABLE).splitlines() == [
        "Rates",
        "  way  pairs/s  tokens",
        "  a    2 (1-3)  12,345",
        "  b    -        0",
    ]


def test_the_file_holds_what_was_printed(tmp_path):
    report = Report("dpo", {"rounds": 7}, [TABLE], ["a note"])
    (path,) = report.save(tmp_path / "new")
    body = json.loads(path.read_text())
    assert (body["benchmark"], body["about"], body["notes"]) == ("dpo", {"rounds": 7}, ["a note"])
    assert body["tables"][0]["rows"][0]["pairs/s"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert str(report).startswith("dpo: rounds 7\n\nRates\n") and str(report).endswith("\n\na note")


def test_a_table_is_printed_when_it_is_there(capsys):
    report = Report("dpo", {"rounds": 7})
    report.add(TABLE)
    assert capsys.readouterr().out == f"\n{TABLE}\n" and report.tables == [TABLE]


def test_names_are_drawn_as_bars_and_numbers_as_lines(tmp_path):
    for x in (("hh", "judged"), (8, 32)):
        points = [(x[0], Spread(1.0, 0.5, 1.5)), (x[1], Spread(2.0, 2.1, 2.2))]
        report = Report(f"chart_{x[0]}", {}, chart=Chart("Speed", "x", "y", {"one": points, "other": points[:1]}))
        written = report.save(tmp_path)
        assert written[1].read_bytes().startswith(b"\x89PNG")
