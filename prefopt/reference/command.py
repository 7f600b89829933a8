"""`prefopt cache`: what the store of reference scores holds, whether it is whole, and room made in it."""

from __future__ import annotations

import argparse


def add_cache(cache: argparse.ArgumentParser) -> None:
    """Give the command its actions."""
    actions = cache.add_subparsers(title="actions", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", help="list the entries, the one used longest ago first")
    ls.set_defaults(run=_ls)
    verify = actions.add_parser("verify", help="read and check every row; what is damaged goes")
    verify.set_defaults(run=_verify)
    gc = actions.add_parser("gc", help="delete damaged files, and entries that are not used")
    gc.add_argument(
        "--max_gb", type=_amount, metavar="N", help="delete until the store has this size, oldest use first"
    )
    gc.add_argument("--older_than", type=_amount, metavar="DAYS", help="delete what was not used for so many days")
    gc.add_argument("--dry_run", action="store_true", help="say what would go, and delete nothing")
    gc.set_defaults(run=_gc)
    for action in (ls, verify, gc):
        action.add_argument(
            "--store", metavar="DIR", help="the store's folder (default: $PREFOPT_STORE, else in the user's cache)"
        )


def _ls(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.reference.store import Store
    from prefopt.reference.upkeep import size, table

    store = Store(options.store)
    entries = store.entries()
    print(f"{store.folder}: {len(entries):,} entries, {size(store.bytes())}")
    if entries:
        print("\n".join(table(entries)))
    if leftovers := store.leftovers():
        print(f"{len(leftovers):,} damaged or unfinished files were set aside; prefopt cache gc deletes them")


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from prefopt.reference.upkeep import verify

    damage = verify(options.store)
    print("\n".join(damage) if damage else "every row is as it was written")
    return 1 if damage else 0


def _gc(options: argparse.Namespace, rest: list[str]) -> None:
    from prefopt.reference.store import Store
    from prefopt.reference.upkeep import gc, size

    if options.max_gb is None and options.older_than is None:
        print("without --max_gb or --older_than only damaged files go")
    done = gc(Store(options.store), max_gb=options.max_gb, older_than=options.older_than, dry_run=options.dry_run)
    for path, number in done.removed:
        print(f"{'would delete' if options.dry_run else 'deleted'} {path} ({size(number)})")
    for path in done.in_use:
        print(f"left {path}: a process computes for it")
    if not done.removed:
        print("nothing to delete")


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return number
