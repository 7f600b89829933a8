"""Commands about single rows, `prefopt inspect` and `prefopt segments`; heavy rooms are opened only when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prefopt.errors import UserError


def add_commands(commands: Any) -> None:
    """Add both to the subparsers of the program."""
    inspect = commands.add_parser(
        "inspect",
        help="show one row as a loss reads it: roles, scored tokens, segments, log-ratios",
        description="Any setting of the recipe can be given as --key value, --key=value or --loss.beta value.",
        allow_abbrev=False,
    )
    _inspect_arguments(inspect)
    segments = commands.add_parser("segments", help="make pairs of segments from pairs of whole conversations")
    actions = segments.add_subparsers(title="actions", required=True, metavar="ACTION")
    _build_arguments(actions.add_parser("build", help="cut each pair where it parts and where its segment ends"))


def add_plugin(command: argparse.ArgumentParser) -> None:
    """Let a command read files with what is the user's own."""
    told = "a Python file of your own, with a loss, a judge or an environment"
    command.add_argument("--plugin", action="append", default=[], metavar="FILE", help=told)


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with the package")
    inspect.add_argument("row", type=int, help="the row, counted from 0")
    inspect.add_argument("--split", default="train", help="train (the default), or another split of the data")
    inspect.add_argument("--model", metavar="PATH", help="a trained model: log-ratios and KL of each token as well")
    inspect.add_argument("--html", metavar="FILE", help="write a page instead of printing")
    add_plugin(inspect)
    inspect.set_defaults(run=_inspect, takes_overrides=True)


def _build_arguments(build: argparse.ArgumentParser) -> None:
    build.add_argument("data", nargs="+", help="files with whole conversations in `chosen` and `rejected`")
    build.add_argument(
        "--select",
        default="to_end",
        metavar="RULE",
        help="single_turn, fixed:N (turns of the assistant), to_end (the default), given (columns start_message and "
        "end_message), judged:COLUMN (a judge's JSON answer), or FILE.py:FUNCTION",
    )
    build.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    build.add_argument("--on_bad_row", choices=("error", "skip"), default="error")
    build.set_defaults(run=_build)


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from prefopt.inspect.command import inspect_command
    from prefopt.losses import load_plugin

    page = None if options.html is None else output_file(options.html, "--html")
    for file in options.plugin:
        load_plugin(file)
    inspect_command(options.recipe, options.row, overrides, split=options.split, model=options.model, html=page)


def _build(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.data import DataSpec
    from prefopt.data.segments import as_json_lines, build_segments, selector_of
    from prefopt.report.results import write_whole

    file = output_file(options.out, "--out")
    source, select = DataSpec(data_files=options.data), selector_of(options.select)
    rows, report = build_segments(source, select, on_bad_row=options.on_bad_row)
    write_whole(file, as_json_lines(rows))
    print("\n".join([*report.lines(), f"written to {file}"]))


def output_file(name: str, option: str) -> Path:
    """The file to write, its folder made beforehand: what was worked out is not lost for want of a place."""
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {file} cannot be written: {error.strerror}. Name another file.") from error
    return file
