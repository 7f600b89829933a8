"""Finding losses by name, refusing what is ambiguous, and losses from outside the package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import pytest

from prefopt.errors import RecipeError, UserError
from prefopt.losses import Loss, LossOutput, Needs, get, knob, load_plugin, make, names, register, registry
from prefopt.losses.knobs import knobs_of
from prefopt.losses.pages import page

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass
from prefopt.losses import Loss, LossOutput, Needs, Pairs, knob, register

@register("{name}")
@dataclass(frozen=True)
class Mine(Loss):
    """Mine (Source: nobody)."""
    slope: float = knob({slope}, above=0, help="steepness")
    needs = Needs(reference="logp")

    def __call__(self, view: Pairs) -> LossOutput:
        return LossOutput(-self.slope * (view.chosen.log_ratio() - view.rejected.log_ratio()), self.unit)
'''


@pytest.fixture(autouse=True)
def same_losses_afterwards():
    """Losses that a test registers are gone when it ends, and entry points are looked for anew."""
    before = dict(registry._LOSSES)
    yield
    registry._LOSSES.clear()
    registry._LOSSES.update(before)
    registry._load_entry_points.cache_clear()


def a_loss(**attributes):
    """A loss class that lacks nothing, with attributes replaced; a None takes one away."""

    def __call__(self, view):
        return LossOutput(view.chosen.total("logp"), self.unit)

    body = {"__doc__": "A loss (Source: a test).", "needs": Needs(), "__call__": __call__, "__module__": __name__}
    body = {name: value for name, value in {**body, **attributes}.items() if value is not None}
    return dataclass(frozen=True)(type("ALoss", (Loss,), body))


# ---- make ------------------------------------------------------------------------------------------------------------


def test_names_are_sorted_and_get_gives_the_class():
    assert names() == sorted(names())
    assert {"dpo", "sft"} <= set(names())
    assert get("dpo").name == "dpo" and isinstance(make("dpo"), get("dpo"))


@pytest.mark.parametrize(("name", "hint"), [("dppo", "`dpo`"), ("DPO", "`dpo`"), ("stf", "`sft`")])
def test_an_unknown_name_gets_the_nearest(name, hint):
    with pytest.raises(RecipeError, match=rf"there is no loss `{name}`\. Did you mean {hint}\? Losses: .*dpo, .*sft"):
        make(name)


def test_a_knob_the_loss_does_not_read_is_an_error_that_names_both():
    with pytest.raises(RecipeError, match=r"loss\.bata: `dpo` does not read it\. Did you mean `beta`\?.* beta\."):
        make("dpo", bata=0.1)
    with pytest.raises(RecipeError, match=r"loss\.beta: `sft` does not read it\..* do: .*`dpo`.* no knobs"):
        make("sft", beta=0.1)
    with pytest.raises(RecipeError, match=r"loss\.label_smoothing: `dpo` does not read it\. .* do: `cdpo`, `rdpo`\."):
        make("dpo", label_smoothing=0.1)


@pytest.mark.parametrize("name", ["sdpo", "sDPO", "SDPO"])
def test_sdpo_is_refused_with_the_three_papers(name):
    with pytest.raises(RecipeError) as refused:
        make(name)
    for part in ("2501.01821", "segment_dpo", "2403.19270", "stepwise", "2601.20802", "self-distillation"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rpo", "mixture of `dpo` and `sft`"),
        ("spin", "procedure"),
        ("stepwise", "is a procedure, not a loss"),
        ("tdpo", "two losses"),
        ("R-DPO", "length-regularised DPO (arXiv 2403.19159), not part of prefopt; robust DPO is `rdpo`."),
        ("robust", "TRL's `robust` is `rdpo` here."),
        ("Robust-DPO", "`Robust-DPO` is `rdpo` here"),
        ("conservative_dpo", "is `cdpo` here"),
        ("RSO", "the loss of its paper is `hinge`"),
        ("slic_hf", "is `slic` here"),
        ("dpo_positive", "is `dpop` here"),
        ("f-dpo", "is `fdpo` here"),
        ("sigmoid", "TRL's `sigmoid` is `dpo` here."),
        ("no_such", "there is no loss `no_such`. Losses:"),
        ("no_such", "One from a file of your own is read with `--plugin FILE`."),
    ],
)
def test_names_from_elsewhere_are_explained(name, words):
    with pytest.raises(RecipeError) as refused:
        make(name)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["apo_zero", "apo_down", "discopop"])
def test_a_name_of_trl_that_is_not_here_is_not_taken_for_another(name, monkeypatch):
    monkeypatch.delitem(registry._LOSSES, name, raising=False)
    with pytest.raises(RecipeError, match=f"TRL's `{name}` is not in this version. Losses:"):
        make(name)
    register(name)(a_loss())
    assert make(name).name == name


def test_an_explanation_says_whether_the_loss_is_here(monkeypatch):
    monkeypatch.delitem(registry._LOSSES, "dpo")
    with pytest.raises(RecipeError, match="TRL's `sigmoid` is `dpo` here, but not in this version"):
        make("sigmoid")
    with pytest.raises(RecipeError, match=r"around `dpo` \(not in this version\)"):
        make("spin")


# ---- register --------------------------------------------------------------------------------------------------------


def test_a_whole_loss_is_registered():
    register("whole")(a_loss())
    assert "whole" in names() and make("whole").name == "whole"


@pytest.mark.parametrize("name", ["DPO", "my-loss", "1st", "", "_x", "sdpo", "sigmoid", "dpo"])
def test_bad_or_taken_names_are_refused(name):
    with pytest.raises(UserError, match=f"loss `{name}`"):
        register(name)(a_loss())


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"__doc__": "A loss of unknown descent."}, "names no source"),
        ({"__doc__": None}, "names no source"),
        ({"needs": None}, "declares no `needs"),
        ({"__call__": None}, "defines no __call__"),
        ({"unit": "token"}, "must be pair"),
        ({"needs": Needs(view="completions")}, "must be completion or token"),
        ({"x": knob(-1.0, help="x", at_most=0), "__annotations__": {"x": "float"}}, ""),
        ({"x": knob(False, help="x"), "__annotations__": {"x": "bool"}}, ""),
        (
            {"x": 0.1, "__annotations__": {"x": "float"}},
            r'write `x: float = knob\(0.1, help="...", above=..., at_most=',
        ),
        (
            {"x": knob(None, help="x"), "__annotations__": {"x": "int | None"}},
            r"`x` lacks .* `x: int . None = knob\(None",
        ),
        ({"x": "mean", "__annotations__": {"x": "str"}}, r'`x: str = knob\(\'mean\', help="...", choices='),
        ({"__annotations__": {"x": "float"}}, r"`x` lacks its meaning or its range: write `x: float = knob\(\.\.\., "),
        ({"x": knob(float("nan"), help="x", above=0), "__annotations__": {"x": "float"}}, "made from its defaults"),
        ({"unit": "pair", "__annotations__": {"unit": "str"}}, "cannot be a knob"),
        ({"x": (1,), "__annotations__": {"x": "tuple"}}, "a knob is a float"),
    ],
)
def test_classes_that_are_no_whole_loss_are_refused(attributes, words):
    if not words:
        register("odd")(a_loss(**attributes))
        return
    with pytest.raises(UserError, match=words):
        register("odd")(a_loss(**attributes))


def test_classes_of_the_wrong_kind_are_refused():
    with pytest.raises(UserError, match="does not derive"):
        register("odd")(int)
    bare = type("Bare", (Loss,), {"__doc__": "Source: x", "needs": Needs(), "__call__": lambda self, view: None})
    with pytest.raises(UserError, match="@dataclass"):
        register("odd")(bare)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"view": "triples"}, "needs.view is 'triples'"),
        ({"reference": "probs"}, "none, logp, distribution"),
        ({"view": "completions", "completions": "chosen"}, "all, desirable"),
        ({"completions": "desirable"}, "a pairs view reads both sides"),
        ({"statistics": ("kl",)}, "needs.statistics is 'kl'"),
        ({"statistics": ("ref_logp",)}, "needs.statistics is 'ref_logp'"),
        ({"statistics": ("forward_kl",), "reference": "logp"}, "reference='distribution'"),
        ({"columns": "score"}, "a tuple of names"),
        ({"columns": ("a",), "optional_columns": ("a",)}, "both required and optional"),
    ],
)
def test_needs_that_contradict_themselves_are_refused(needs, words):
    with pytest.raises(UserError, match=words):
        Needs(**needs)


# ---- knobs -----------------------------------------------------------------------------------------------------------


def test_whole_numbers_serve_where_numbers_are_wanted():
    assert make("dpo", beta=1) == make("dpo", beta=1.0)
    assert isinstance(make("dpo", beta=1).beta, float)


def test_text_that_reads_as_a_number_gets_the_reason():
    with pytest.raises(RecipeError, match="YAML reads 1e-6 as text"):
        make("dpo", beta="1e-1")


def test_every_kind_of_knob():
    hints = {"share": "float | None", "rounds": "int", "mode": "str", "on": "bool"}
    fields = {
        "share": knob(None, help="a share", at_least=0, at_most=1),
        "rounds": knob(2, help="how many", above=0, below=9),
        "mode": knob("mean", help="how", choices=("mean", "sum")),
        "on": knob(True, help="whether"),
    }
    register("many")(a_loss(__annotations__=hints, **fields))
    assert [each.allowed for each in knobs_of(get("many"))] == [
        "a number at least 0, at most 1, or null",
        "a whole number above 0, below 9",
        "one of mean | sum",
        "true or false",
    ]
    assert make("many", share=1, rounds=8, mode="sum", on=False).share == 1.0
    wrong = {"share": 1.1, "rounds": 2.0, "mode": "max", "on": 1}
    for name, value in wrong.items():
        with pytest.raises(RecipeError, match=rf"loss\.{name}: `many` takes"):
            make("many", **{name: value})
    assert "share: default null; at least 0, at most 1; a share" in page("many")


# ---- plugins ---------------------------------------------------------------------------------------------------------


def write(folder, text, name="my_loss.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_plugin_is_a_loss_like_any_other(tmp_path):
    path = write(tmp_path, PLUGIN.format(name="mine", slope=2.0))
    assert load_plugin(path) == ["mine"]
    assert "mine" in names() and make("mine", slope=3).slope == 3.0
    assert "slope: default 2.0; above 0; steepness" in page("mine")
    with pytest.raises(RecipeError, match=r"loss\.slope: `mine` takes a number above 0"):
        make("mine", slope=-1)


def test_a_plugin_may_be_loaded_again_after_a_change(tmp_path):
    path = write(tmp_path, PLUGIN.format(name="mine", slope=2.0))
    load_plugin(path)
    path.write_text(PLUGIN.format(name="mine", slope=4.125))
    assert load_plugin(str(path)) == ["mine"]
    assert make("mine").slope == 4.125


def test_two_plugins_cannot_share_a_name(tmp_path):
    load_plugin(write(tmp_path, PLUGIN.format(name="mine", slope=2.0)))
    other = write(tmp_path, PLUGIN.format(name="mine", slope=2.0), "other.py")
    with pytest.raises(UserError, match=r"other\.py:\d+: loss `mine`: the name is taken by Mine of .*my_loss\.py"):
        load_plugin(other)
    with pytest.raises(UserError, match=r"the name is taken by DPO of .*dpo\.py"):
        load_plugin(write(tmp_path, PLUGIN.format(name="dpo", slope=2.0), "third.py"))
    assert get("dpo").__module__ == "prefopt.losses.dpo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "registers no loss.*For a judge or an environment, write a function or a class"),
        (PLUGIN.replace('@register("{name}")', "").format(name="mine", slope=2.0), "registers no loss"),
        ("x = 1\ny = (\n", r"my_loss\.py:2: not valid Python"),
        ("x = 1\n\nimport no_such_module\n", r"my_loss\.py:3: ModuleNotFoundError: No module named 'no_such_module'"),
        (PLUGIN.format(name="mine", slope=-2.0), r"my_loss\.py:\d+: loss `mine` \(Mine\): it cannot be made"),
        (PLUGIN.format(name="mine", slope=2.0) + "1 / 0\n", "ZeroDivisionError"),
        (
            PLUGIN.replace("(frozen=True)", "").format(name="mine", slope=2.0),
            r"my_loss\.py:\d+: a loss is a frozen dataclass: write @dataclass\(frozen=True\) above",
        ),
    ],
)
def test_a_broken_plugin_is_refused_with_file_and_line(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load_plugin(write(tmp_path, text))
    assert "mine" not in names()


def test_a_missing_plugin_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_plugin(tmp_path / "absent.py")
    with pytest.raises(UserError, match="not a Python file"):
        load_plugin(write(tmp_path, "x = 1", "my_loss.txt"))


# ---- entry points ----------------------------------------------------------------------------------------------------


class EntryPoint:
    """An installed package's promise of a loss."""

    value = "their_package.losses"

    def __init__(self, load):
        self.load = load


@pytest.fixture
def installed(monkeypatch):
    """Set the entry points of the environment; says which groups were asked for."""
    groups = []

    def install(*loads):
        def entry_points(group):
            groups.append(group)
            return [EntryPoint(load) for load in loads]

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        registry._load_entry_points.cache_clear()
        return groups

    return install


def test_losses_of_installed_packages_are_found_once_and_late(installed):
    groups = installed(lambda: register("theirs")(a_loss()))
    make("dpo")
    assert groups == []
    assert make("theirs").name == "theirs"
    assert "theirs" in names()
    assert groups == ["prefopt.losses"]


def test_a_broken_package_is_reported_and_the_others_load(installed):
    def broken():
        raise ImportError("no such thing")

    installed(broken, lambda: register("theirs")(a_loss()))
    with pytest.warns(UserWarning, match=r"losses of `their_package\.losses` did not load: ImportError: no such thing"):
        assert "theirs" in names()
