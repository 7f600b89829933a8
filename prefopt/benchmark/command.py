"""The command line of the benchmarks. Each subcommand's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark, print it and write it under `--output`; a `UserError` is printed alone, status 2."""
    asked = _parser().parse_args(arguments)
    try:
        report = asked.run(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print("\n" + "\n\n".join([report.title, *report.notes]) + "\n")
    for path in report.save(asked.output):
        print(f"written: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=_count, default=7, help="counted rounds in which every way takes its turn")
    common.add_argument("--steps", type=_count, default=4, help="steps of a round")
    common.add_argument("--batch_size", type=_count, default=8, help="pairs of a step")
    common.add_argument("--threads", type=_count, default=1)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--quick", action="store_true", help="a tiny model: shows that all works, in seconds")
    common.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the length profiles lie")
    common.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser = argparse.ArgumentParser(prog="scripts/benchmark.py", description="Speed: ratios of ways that take turns.")
    commands = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    dpo = commands.add_parser("dpo", parents=[common], help="a DPO step: TRL, prefopt and the floor")
    dpo.add_argument("--check", action="store_true", help="no times: the loss curves of both trainers agree")
    dpo.add_argument("--profiles", nargs="+", default=["hh", "judged"], choices=["hh", "judged"])
    dpo.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    dpo.set_defaults(run=_dpo)

    tdpo = commands.add_parser("tdpo", parents=[common], help="losses over the whole vocabulary beside DPO")
    parts = ["head", "memory", "step"]
    tdpo.add_argument("--parts", nargs="+", default=parts, choices=parts)
    tdpo.set_defaults(run=_tdpo)

    losses = commands.add_parser("losses", parents=[common], help="a step of every loss beside DPO's")
    losses.set_defaults(run=_losses)

    reference = commands.add_parser("reference", parents=[common], help="several algorithms, one store of scores")
    reference.set_defaults(run=_reference)

    scaling = commands.add_parser("scaling", parents=[common], help="one axis at a time")
    axes = ["length", "prompt", "batch", "vocabulary", "model"]
    scaling.add_argument("--axes", nargs="+", default=axes, choices=axes)
    scaling.set_defaults(run=_scaling)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number from 1 up")
    return number


def _options(asked: argparse.Namespace) -> Any:
    import torch

    from prefopt.benchmark.setting import Options

    torch.set_num_threads(asked.threads)
    quick = {"rounds": min(asked.rounds, 2), "steps": 1, "batch_size": 2} if asked.quick else {}
    given = {name: getattr(asked, name) for name in Options.__dataclass_fields__}
    return Options(**{**given, **quick})


def _dpo(asked: argparse.Namespace) -> Any:
    from prefopt.benchmark import dpo

    options = _options(asked)
    return dpo.check(options) if asked.check else dpo.run(options, tuple(asked.profiles), tuple(asked.precisions))


def _tdpo(asked: argparse.Namespace) -> Any:
    from prefopt.benchmark import tdpo

    return tdpo.run(_options(asked), tuple(asked.parts))


def _losses(asked: argparse.Namespace) -> Any:
    from prefopt.benchmark import losses

    return losses.run(_options(asked))


def _reference(asked: argparse.Namespace) -> Any:
    from prefopt.benchmark import reference

    return reference.run(_options(asked))


def _scaling(asked: argparse.Namespace) -> Any:
    from prefopt.benchmark import scaling

    return scaling.run(_options(asked), tuple(asked.axes))
