"""Values are read by the type of their field, whatever YAML 1.1 would make of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import yaml

from prefopt.recipe.problems import Place, Problems
from prefopt.recipe.tree import parse
from prefopt.recipe.values import Mismatch, convert
from prefopt.recipe.write import to_yaml

REFUSED = object()

# What each way of writing means for a field of each type.
#   written        float      int      bool     str          anything
MATRIX = {
    "1e-6": (1e-6, REFUSED, REFUSED, "1e-6", 1e-6),
    "1E-6": (1e-6, REFUSED, REFUSED, "1E-6", 1e-6),
    ".1": (0.1, REFUSED, REFUSED, ".1", 0.1),
    "1.": (1.0, REFUSED, REFUSED, "1.", 1.0),
    "3": (3, 3, REFUSED, "3", 3),
    "-3": (-3, -3, REFUSED, "-3", -3),
    "+3": (3, 3, REFUSED, "+3", 3),
    "3.0": (3.0, REFUSED, REFUSED, "3.0", 3.0),
    "1_000": (REFUSED, REFUSED, REFUSED, "1_000", REFUSED),
    "0o10": (REFUSED, REFUSED, REFUSED, "0o10", REFUSED),
    "010": (REFUSED, REFUSED, REFUSED, "010", REFUSED),
    "0x1F": (REFUSED, REFUSED, REFUSED, "0x1F", REFUSED),
    "0b11": (REFUSED, REFUSED, REFUSED, "0b11", REFUSED),
    "1:30": (REFUSED, REFUSED, REFUSED, "1:30", REFUSED),
    "1:30:00.5": (REFUSED, REFUSED, REFUSED, "1:30:00.5", REFUSED),
    "2024-01-02": (REFUSED, REFUSED, REFUSED, "2024-01-02", REFUSED),
    "2024-01-02 10:00:00": (REFUSED, REFUSED, REFUSED, "2024-01-02 10:00:00", REFUSED),
    "NaN": (REFUSED, REFUSED, REFUSED, "NaN", REFUSED),
    ".nan": (REFUSED, REFUSED, REFUSED, ".nan", REFUSED),
    "inf": (REFUSED, REFUSED, REFUSED, "inf", REFUSED),
    "-.inf": (REFUSED, REFUSED, REFUSED, "-.inf", REFUSED),
    "1e400": (REFUSED, REFUSED, REFUSED, "1e400", REFUSED),
    "1e-400": (REFUSED, REFUSED, REFUSED, "1e-400", REFUSED),
    "9" * 30: (REFUSED, REFUSED, REFUSED, "9" * 30, REFUSED),
    "yes": (REFUSED, REFUSED, True, "yes", REFUSED),
    "no": (REFUSED, REFUSED, False, "no", REFUSED),
    "On": (REFUSED, REFUSED, True, "On", REFUSED),
    "off": (REFUSED, REFUSED, False, "off", REFUSED),
    "y": (REFUSED, REFUSED, REFUSED, "y", "y"),
    "true": (REFUSED, REFUSED, True, "true", True),
    "FALSE": (REFUSED, REFUSED, False, "FALSE", False),
    "1": (1, 1, REFUSED, "1", 1),
    '"false"': (REFUSED, REFUSED, REFUSED, "false", "false"),
    '"1e-6"': (REFUSED, REFUSED, REFUSED, "1e-6", "1e-6"),
    "'3'": (REFUSED, REFUSED, REFUSED, "3", "3"),
    "null": (REFUSED, REFUSED, REFUSED, REFUSED, None),
    "~": (REFUSED, REFUSED, REFUSED, REFUSED, None),
    "": (REFUSED, REFUSED, REFUSED, REFUSED, None),
    '""': (REFUSED, REFUSED, REFUSED, "", ""),
    "word": (REFUSED, REFUSED, REFUSED, "word", "word"),
    "!!float 1": (1, 1, REFUSED, "1", 1),
    "[1]": (REFUSED, REFUSED, REFUSED, REFUSED, [1]),
    "{a: 1}": (REFUSED, REFUSED, REFUSED, REFUSED, {"a": 1}),
}


def read(written: str, hint: Any) -> Any:
    """The value of `key: <written>`, or REFUSED."""
    problems = Problems()
    node = parse(f"key: {written}\n", "file", problems).entries["key"]
    problems.refuse()
    try:
        return convert(node, hint)
    except Mismatch as mismatch:
        assert mismatch.reason.endswith((".", "?")), mismatch.reason
        assert mismatch.node.place == Place("file", 1)
        return REFUSED


@pytest.mark.parametrize("written", MATRIX)
def test_matrix(written):
    for hint, expected in zip((float, int, bool, str, Any), MATRIX[written], strict=True):
        value = read(written, hint)
        assert value == expected and type(value) is type(expected), (hint, value)


@pytest.mark.parametrize(
    ("written", "hint", "expected"),
    [
        ("null", float | None, None),
        ("~", str | None, None),
        ("None", str | None, REFUSED),
        ("5", int | None, 5),
        ("no", str | bool, False),
        ("all", str | bool, "all"),
        ("[a, b]", str | list[str], ["a", "b"]),
        ("a", str | list[str], "a"),
        ("a", list[str], REFUSED),
        ("[1, [2]]", list[float], REFUSED),
        ("{a: 1e-3, b: {c: null}}", dict[str, Any], {"a": 1e-3, "b": {"c": None}}),
        ("{a: yes}", dict[str, Any], REFUSED),
        ("{a: 1}", dict[str, str], {"a": "1"}),
        ("{a: 1}", dict | str | None, {"a": 1}),
        ("mean", Literal["mean", "sum"], "mean"),
        ("median", Literal["mean", "sum"], REFUSED),
    ],
)
def test_compound_types(written, hint, expected):
    assert read(written, hint) == expected


def test_the_reason_says_what_to_write():
    def reason(written: str, hint: Any) -> str:
        with pytest.raises(Mismatch) as mismatch:
            convert(parse(f"key: {written}", "file", Problems()).entries["key"], hint)
        return f"{mismatch.value.path}: {mismatch.value.reason}"

    assert reason("1_000", int) == ": `1_000` has an underscore. Write 1000."
    assert reason("10.0", int) == ": expected a whole number, got `10.0`. Write 10."
    assert reason('"1"', float) == ': expected a number, got the text "1". Remove the quotes.'
    assert reason("None", int | None) == ": `None` is text in a recipe. Write null, or remove the line."
    assert reason("[a, {b: no}]", list[Any]).startswith("1.b: `no` is a word to some readers and false to others.")


def test_written_text_reads_back():
    """Any text survives being written into a block without declared types."""
    texts = [key for key in MATRIX if not key.startswith(("[", "{", "!"))] + [
        "a: b",
        "#",
        "- x",
        "é",
        "two\nlines",
        "<<",
        "=",
    ]
    values = {f"k{index}": text for index, text in enumerate(texts)} | {"n": 1e-6, "m": -3, "b": False, "z": None}
    tree = parse(to_yaml({"block": values}), "file", Problems())
    assert convert(tree.entries["block"], dict[str, Any]) == values
    assert yaml.safe_load(to_yaml({"block": values}))["block"] == values
