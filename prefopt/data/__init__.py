"""From files to batches: sources and formats here, then token rows, then gather plans. No model is known in this room.

`load_examples(DataSpec(data_files="pairs.jsonl"))` is the usual way in.
"""

from __future__ import annotations

from prefopt.data.columns import check_columns
from prefopt.data.formats import Example, unpair
from prefopt.data.problems import DataReport, Problem, Where
from prefopt.data.sources import LoadedExamples, load_examples, load_train_test, split_by_prompt
from prefopt.data.spec import DataSpec

__all__ = [
    "DataReport",
    "DataSpec",
    "Example",
    "LoadedExamples",
    "Problem",
    "Where",
    "check_columns",
    "load_examples",
    "load_train_test",
    "split_by_prompt",
    "unpair",
]
