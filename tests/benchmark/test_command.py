"""Every benchmark runs from its command line; the form of what it writes is checked, and never a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prefopt.benchmark.command import main
from prefopt.losses import names


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes when it is in a hurry and no real data is near."""
    assert main([*arguments, "--quick", "--rounds", "2", "--output", str(folder), "--data", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".png").is_file()
    body = json.loads(path.read_text())
    assert {"torch", "trl", "rounds", "threads", "device"} <= body["about"].keys()
    for value in (cell for table in body["tables"] for row in table["rows"] for cell in row.values()):
        numbers = value.values() if isinstance(value, dict) else [value] if isinstance(value, float) else []
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
    return body


def rows(body: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """The rows of the table whose title ends so."""
    (found,) = [table["rows"] for table in body["tables"] if table["title"].endswith(title)]
    return found


def test_dpo(tmp_path, capsys):
    body = run(tmp_path, "dpo", "--profiles", "hh", "--precisions", "bfloat16")
    ways = [row["way"] for row in rows(body, "rates")]
    assert ways[:3] == ["TRL, rows in random order", "TRL, lengths grouped", "prefopt, plain rows"]
    assert "prefopt, prompt shared" in ways
    assert ways[-1] == "floor"
    shares = [float(share.rstrip("%")) for share in list(rows(body, "where a step's time goes")[0].values())[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    memory = rows(body, "peak memory of a process of its own, MiB")
    assert memory[0]["of TRL's"] == 1.0 and all(row["peak"] > row["imports"] for row in memory)
    assert "of the floor's speed" in capsys.readouterr().out


def test_both_trainers_have_the_same_losses(tmp_path):
    body = run(tmp_path, "dpo", "--check")
    (found,) = rows(body, "Agreement")
    assert found["agree"] == "True" and found["largest difference"] < 1e-4
    losses = [row["prefopt"] for row in rows(body, "dropout off")]
    assert len(set(losses)) > 1  # the model moves


def test_tdpo(tmp_path):
    body = run(tmp_path, "tdpo")
    heads = [row["head"] for row in rows(body, "M 16, H 8, V 64")]
    assert {"dpo, prefopt", "tdpo2, dense"} <= set(heads)
    assert {"tdpo2, prefopt", "tdpo2, frozen"} <= set(heads)
    (steps,) = [table["rows"] for table in body["tables"] if table["title"].startswith("Step of the trainer")]
    assert steps[0]["step"] == "dpo, cached" and steps[0]["times dpo"]["median"] == 1.0
    assert {"tdpo2, live", "tdpo2, adapter, cached"} <= {row["step"] for row in steps}


def test_losses(tmp_path):
    body = run(tmp_path, "losses")
    measured = {row["loss"] for row in rows(body, "float32")}
    left_out = {note.split()[0] for note in body["notes"]}
    assert measured | left_out == set(names())
    assert {"dpo", "kto", "odpo", "sft"} <= measured


def test_reference(tmp_path):
    body = run(tmp_path, "reference")
    (together,) = rows(body, "Together")
    assert together["passes, a store each"] > together["passes, one store"] >= 1
    first, second, *_ = rows(body, "seconds until training can begin")
    assert first["scored"] == first["answers"] and first["found"] == 0
    assert second["scored"] == 0 and second["found"] == second["answers"]


def test_scaling(tmp_path):
    body = run(tmp_path, "scaling", "--axes", "batch")
    assert [len(table["rows"]) for table in body["tables"]] == [2]
    assert rows(body, "by pairs of a step")[0]["pairs of a step"] == "2"


def test_a_wrong_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--rounds", "0"])
    assert "0 is not a number from 1 up" in capsys.readouterr().err
