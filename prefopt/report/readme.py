"""The generated parts of the project's README: drawn from the code itself, so that they cannot fall behind it.

    python -m prefopt.report.readme            # status 1 when README.md is behind
    python -m prefopt.report.readme --write    # brings it up to date

A part stands between the lines `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from prefopt.config import PreferenceConfig, shown_defaults
from prefopt.errors import UserError, nearest
from prefopt.losses.pages import table_rows
from prefopt.recipe import bundled_recipes
from prefopt.settings import CHOICES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# Counterparts of losses in TRL, and what the claims of papers came to.
EVIDENCE = ROOT / "tests" / "oracle" / "evidence.json"
FORMULAS = ROOT / "tests" / "oracle" / "float64.py"
OWN_TESTS = ROOT / "tests" / "losses"

_BLOCK = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_WIDTH = 34
# Folders whose files speak for themselves; of the others every module has its line.
_WHOLE_FOLDERS = {
    "configs/accelerate": "launch settings for one process, DDP, FSDP2 and DeepSpeed",
    "tests": "mirrors prefopt/; oracle/ against TRL and formulas, distributed/ on two ranks, faults/ kills and damage",
}
_FOLDERS = {
    "configs": "recipes, shipped with the package",
    "scripts": "entry points and tools of a checkout; no logic",
    "examples": "short plain scripts, each run by the tests",
    "examples/claims": "what papers claim, in miniature: a table over seeds, and whether it was seen",
}


def renewed(text: str) -> str:
    """The README's text with every generated part made anew. `UserError` for a part that nothing here makes."""
    return _BLOCK.sub(lambda block: f"<!-- generated: {block[1]} -->\n{_part(block[1])}\n<!-- end -->", text)


def losses_table() -> str:
    """Every registered loss: what it does and needs, what it is checked against, and whether its claim was seen."""
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    head = ("loss", "in a sentence", "paper", "data", "reference", "columns", "defaults", "oracle", "claim seen")
    rows = (
        (f"`{loss.name}`", loss.line, _linked(loss.paper), loss.data, loss.reference, loss.columns, loss.defaults,
         _oracle(loss.name, found.get(loss.name, {})), _claims(found.get(loss.name, {})))
        for loss in table_rows()
    )  # fmt: skip
    return _table(head, rows)


def recipes_table() -> str:
    """Every recipe that comes with the package and the sentence it opens with."""
    rows = ((f"[`{name}`](configs/{name}.yaml)", _first_comment(path)) for name, path in bundled_recipes().items())
    return _table(("recipe", "what it does"), rows)


def defaults_table() -> str:
    """The settings a resolved recipe always shows, with their defaults."""
    own = {field.name: field.metadata.get("help", "") for field in fields(PreferenceConfig)}
    annotated = PreferenceConfig.__annotations__
    rows = []
    for name, default in shown_defaults().items():
        meaning = own[name] if name in annotated else "as in transformers"
        choices = f" One of {', '.join(CHOICES[name])}." if name in CHOICES and CHOICES[name][0] not in meaning else ""
        rows.append((f"`{name}`", f"`{_value(default)}`", meaning + choices))
    return _table(("setting", "default", "meaning"), rows)


def tree() -> str:
    """The files of the project, one line each, with the first sentence they say about themselves."""
    lines = [line for folder in ("configs", "examples", "prefopt", "scripts", "tests") for line in _folder(folder, 0)]
    return "\n".join(["```", *lines, "```"])


PARTS: dict[str, Callable[[], str]] = {
    "losses": losses_table,
    "recipes": recipes_table,
    "defaults": defaults_table,
    "tree": tree,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or rewrite README.md; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prefopt.report.readme", description="Generated parts of README.md."
    )
    parser.add_argument("--write", action="store_true", help="rewrite README.md instead of checking it")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = renewed(old)
    if options.write:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md is behind the code. Run: python -m prefopt.report.readme --write", file=sys.stderr)
        return 1
    return 0


def _part(name: str) -> str:
    if name not in PARTS:
        raise UserError(f"README.md: nothing generates `{name}`.{nearest(name, PARTS)} Known: {', '.join(PARTS)}.")
    return PARTS[name]()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _oracle(loss: str, evidence: dict[str, Any]) -> str:
    """What the tests compare a loss with: a formula written apart from it, and its counterpart in TRL."""
    trl = [f"TRL's `{evidence['trl']}`"] if "trl" in evidence else []
    return ", ".join([*(["formula"] if _has_formula(loss) else []), *trl])


def _has_formula(loss: str) -> bool:
    """Whether the oracle has a function of the loss's name, or the loss's own tests say what its formula is.

    The tests are read, not run: they need more than a reader of this page has installed.
    """
    formulas = ast.parse(FORMULAS.read_text(encoding="utf-8"))
    if any(isinstance(node, ast.FunctionDef) and node.name == loss for node in formulas.body):
        return True
    own = OWN_TESTS / f"test_{loss}.py"
    calls = ast.walk(ast.parse(own.read_text(encoding="utf-8") if own.is_file() else ""))
    facts = [node for node in calls if isinstance(node, ast.Call) and ast.unparse(node.func) == "Facts"]
    return any(keyword.arg == "formula" for call in facts for keyword in call.keywords)


def _claims(evidence: dict[str, Any]) -> str:
    links = [
        f"[{claim}](examples/claims/{script}.py): {'seen' if seen else 'not seen'}"
        for script, claim, seen in evidence.get("claims", ())
    ]
    return "; ".join(links)


def _linked(paper: str) -> str:
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _value(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else json.dumps(default).strip('"')


def _folder(path: str, depth: int) -> Iterator[str]:
    """The line of a folder, then those of its files, then those of its folders."""
    folder = ROOT / path
    about = _WHOLE_FOLDERS.get(path) or _FOLDERS.get(path) or _said(folder / "__init__.py")
    yield _line(f"{folder.name}/", depth, about)
    if path in _WHOLE_FOLDERS:
        return
    for file in sorted(file for file in folder.iterdir() if _is_shown(file)):
        yield _line(file.name, depth + 1, _said(file))
    for inner in sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name != "__pycache__"):
        yield from _folder(f"{path}/{inner.name}", depth + 1)


def _is_shown(file: Path) -> bool:
    return file.is_file() and file.name != "__init__.py" and file.suffix in (".py", ".yaml", ".md", "")


def _line(name: str, depth: int, text: str) -> str:
    return f"{'  ' * depth + name:<{_WIDTH}}{text}".rstrip()


def _said(file: Path) -> str:
    """What a file says it is: the first sentence of its docstring, its first comment, or its title."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        return re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0].rstrip(".")
    if file.suffix == ".md":
        return "the rules of this room"
    return _first_comment(file).rstrip(".")


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    said = next((line for line in lines if line.startswith("#") and not line.startswith("#!")), "#")
    return said.lstrip("# ").rstrip()


if __name__ == "__main__":
    sys.exit(main())
