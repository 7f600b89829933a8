"""What each of two ranks does for `test_shards.py`: it samples its shards of one folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

from accelerate import PartialState
from accelerate.utils import gather_object

from prefopt.generation import shards
from tests.generation.test_shards import write
from tests.helpers import make_model, make_tokenizer


def main() -> None:
    """Write the folder given, and which shards each rank wrote to a file beside it."""
    PartialState(cpu=True)
    folder = Path(sys.argv[1])
    numbers, stock = [], shards._write_shard

    def write_shard(folder: Path, number: int, *rest: object) -> None:
        numbers.append(number)
        stock(folder, number, *rest)

    shards._write_shard = write_shard
    write(folder, make_model(vocab_size=len(make_tokenizer())))
    by_rank = gather_object([numbers])
    if PartialState().is_main_process:
        folder.with_suffix(".json").write_text(json.dumps(by_rank))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
