"""The command line. Heavy rooms are opened only by the command that needs them."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import Stopped, UserError
from prefopt.exit_status import leave_status
from prefopt.reference.command import add_cache
from prefopt.row_commands import add_commands, add_plugin, output_file

_OVERRIDES = "Any setting of the recipe can be given as --key value, --key=value or --loss.beta value; it wins."
_STDOUT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a `UserError` is printed as its message alone, status 2.

    A run that a signal stopped has said so itself; its status is 128 plus the number of the signal.
    """
    status = _status(sys.argv[1:] if arguments is None else arguments)
    leave_status(status)
    return status


def _status(arguments: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown argument: {rest[0]}")
    try:
        status = options.run(options, rest) or 0
        sys.stdout.flush()  # what is left in the buffer may be too much for the reader as well
        return status
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        # A rank may fail alone, so each speaks; only the first speaks plainly.
        rank = "" if _is_first_rank() else f"[rank {os.environ['RANK']}] "
        print(f"{rank}error: {_message(error)}", file=sys.stderr, flush=True)
        return 2
    except Stopped as stop:
        return int(str(stop.code))
    except KeyboardInterrupt:
        if _is_first_rank():
            print("stopped by Ctrl-C; the same command goes on where it can", file=sys.stderr, flush=True)
        return 130
    finally:
        _leave_together()


def _message(error: UserError) -> str:
    """What an error says; one from a process that loads data comes wrapped in the traceback it had there."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefopt", description="Preference optimisation of language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_recipe_commands(commands)
    _add_listings(commands)
    _add_evaluate(commands.add_parser("evaluate", help="score a checkpoint on a preference file"))
    add_cache(commands.add_parser("cache", help="list, check or clear the stored reference scores"))
    add_commands(commands)
    _add_push(commands.add_parser("push", help="send a run folder, an adapter or a checkpoint to the Hub"))
    return parser


def _add_recipe_commands(commands: Any) -> None:
    """What runs a recipe, or says what it would do."""
    train = commands.add_parser("train", help="train as a recipe says", description=_OVERRIDES, allow_abbrev=False)
    train.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with the package")
    train.add_argument("--stage", metavar="K", help="run this stage of the plan alone, by its number or its name")
    train.set_defaults(run=_train, takes_overrides=True)

    run = commands.add_parser(
        "run",
        help="train stage by stage, each in processes of its own",
        description=f"{_OVERRIDES} Options of `accelerate launch` may stand among them and go to each launch.",
        allow_abbrev=False,
    )
    run.add_argument("recipe")
    run.set_defaults(run=_run, takes_overrides=True)

    explain = commands.add_parser(
        "explain",
        help="say what a recipe would do: steps, tokens, reference, memory",
        description=_OVERRIDES,
        allow_abbrev=False,
    )
    explain.add_argument("recipe")
    explain.set_defaults(run=_explain, takes_overrides=True)
    for command in (train, run, explain):
        add_plugin(command)


def _add_listings(commands: Any) -> None:
    recipe = commands.add_parser("recipe", help="print a recipe that comes with the package, or list them")
    recipe.add_argument("name", nargs="?")
    recipe.set_defaults(run=_recipe)

    losses = commands.add_parser("losses", help="list the losses, or print the page of one")
    losses.add_argument("name", nargs="?")
    losses.set_defaults(run=_losses)
    add_plugin(losses)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a local folder or a Hub name; an adapter folder too")
    command.add_argument("--data", required=True, nargs="+", help="preference files: pairs, or labelled answers")
    command.add_argument("--reference", help="the model that log-ratios are taken against")
    command.add_argument("--batch_size", type=_count, default=8)
    command.add_argument("--max_length", type=_count, default=1024, help="most tokens of a prompt and one answer")
    command.add_argument("--max_dropped", type=float, default=0.01, help="largest share of rows the limit may drop")
    command.add_argument("--json", metavar="FILE", help="write the figures there as well")
    command.set_defaults(run=_evaluate)


def _add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder")
    command.add_argument("--repo", metavar="NAME", help="NAME or USER/NAME; else where the run pushed to")
    command.add_argument("--private", action="store_true", default=None, help="if the repository is made now")
    command.add_argument("--revision", metavar="BRANCH", help="a branch other than main")
    command.add_argument("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    command.set_defaults(run=_push)


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from prefopt.launch import TIMEOUT, prepare_environment, starting_line

    asked = prepare_environment()
    from prefopt.console import say
    from prefopt.procedures import make_plan, run_plan
    from prefopt.recipe import load_recipe

    _load_plugins(options)
    recipe = load_recipe(options.recipe, overrides)
    say(starting_line(asked, recipe.training.get("ddp_timeout", TIMEOUT)))
    run_plan(make_plan(recipe), options.stage)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from prefopt.launch import is_launched, split_options
    from prefopt.procedures import make_plan
    from prefopt.procedures.parent import run_launched
    from prefopt.recipe import load_recipe
    from prefopt.recipe.read import known_names

    if is_launched():
        raise UserError("prefopt run starts `accelerate launch` itself. Give it the options: prefopt run RECIPE ...")
    _load_plugins(options)
    launcher, overrides = split_options(rest, known_names())
    stages = make_plan(load_recipe(options.recipe, overrides))
    plugins = [word for file in options.plugin for word in ("--plugin", file)]
    return run_launched(stages, launcher, [options.recipe, *plugins, *overrides])


def _explain(options: argparse.Namespace, overrides: list[str]) -> None:
    from prefopt.explain import explain
    from prefopt.recipe import load_recipe

    _load_plugins(options)
    print(explain(load_recipe(options.recipe, overrides)))


def _recipe(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.recipe import bundled_recipes, recipe_text

    print(recipe_text(options.name) if options.name else "\n".join(bundled_recipes()), end="" if options.name else "\n")


def _losses(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.losses.pages import page, table_rows

    _load_plugins(options)
    if options.name:
        print(page(options.name))
        return
    for name, *_, summary in table_rows():
        print(f"{name:14} {summary}")


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.launch import prepare_environment, starting_line

    asked = prepare_environment()
    from prefopt.console import say
    from prefopt.evaluation import evaluate_files, evaluation_text
    from prefopt.report.results import write_whole

    say(starting_line(asked))
    file = output_file(options.json, "--json") if options.json and _is_first_rank() else None
    result = evaluate_files(
        options.model,
        options.data,
        options.reference,
        batch_size=options.batch_size,
        max_length=options.max_length,
        max_dropped=options.max_dropped,
    )
    say(evaluation_text(result))
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")


def _push(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.hub.command import push_folder

    push_folder(
        Path(options.folder),
        options.repo,
        private=options.private,
        revision=options.revision,
        dry_run=options.dry_run,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


def _load_plugins(options: argparse.Namespace) -> None:
    from prefopt.losses import load_plugin

    for file in options.plugin:
        load_plugin(file)


def _is_first_rank() -> bool:
    """Whether this process speaks and writes for all: ranks that fail together would say the same several times."""
    return os.environ.get("RANK", "0") == "0"


def _reader_has_left() -> bool:
    """Whether nobody reads what is printed, as after `| head`; the interpreter's own last flush then fails no more."""
    asked = select.poll()
    asked.register(_STDOUT, 0)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


def _leave_together() -> None:
    """Close the process group: without it a rank may abort after its work, and the launcher calls that a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
