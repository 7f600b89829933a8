"""From the name of one source to its rows: local files, folders written by `save_to_disk`, the Hub, memory."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.data.problems import Flaw, Rows
from prefopt.data.readers import READERS, read_file, read_memory, rename_columns, transform
from prefopt.data.spec import DataSpec, FileNames
from prefopt.errors import DataError, nearest

# Loaders of the `datasets` library that stand in `path` when `data_files` hold the data.
FILE_LOADERS = ("json", "csv", "parquet")


def open_source(spec: DataSpec) -> Iterator[tuple[str, Rows]]:
    """Name and rows of each file (or of the one table) of a source, under our column names."""
    for name, rows in _open(spec):
        yield name, _only(rows, spec) if spec.columns is not None else rows


def _open(spec: DataSpec) -> Iterator[tuple[str, Rows]]:
    if spec.rows is not None:
        rows = _of_split(spec.rows, spec, spec.rows_name) if isinstance(spec.rows, Mapping) else spec.rows
        yield spec.rows_name, rename_columns(read_memory(rows, spec.rows_name), spec.column_names)
    elif (files := _local_files(spec)) is not None:
        for path in files:
            yield str(path), read_file(path.expanduser(), str(path), spec.column_names)
    else:
        name = f"{spec.path} [{spec.split}]"
        table = _saved_folder(spec) if _is_saved_folder(str(spec.path)) else _hub(spec)
        yield name, rename_columns(read_memory(table, name), spec.column_names)


def _only(rows: Rows, spec: DataSpec) -> Rows:
    """The rows with the columns `spec.columns` alone."""
    ours = {their: our for our, their in spec.column_names.items()}
    kept = [ours.get(column, column) for column in spec.columns or ()]

    def keep(values: dict[str, Any]) -> dict[str, Any]:
        for column in kept:
            if column not in values:
                message = f"`columns` keeps this column, which is not there.{nearest(column, values)}"
                raise Flaw("missing_column", message, column)
        return {column: values[column] for column in kept}

    return transform(rows, keep)


def _of_split(by_split: Mapping[str, Any], spec: DataSpec, name: str) -> Any:
    if spec.split not in by_split:
        known = ", ".join(by_split) or "none"
        raise DataError(f"{name}: there is no split `{spec.split}`.{nearest(spec.split, by_split)} Splits: {known}.")
    return by_split[spec.split]


# Local files


def _local_files(spec: DataSpec) -> list[Path] | None:
    """The files a source names on this machine; None when the `datasets` library must find its data."""
    named: FileNames | None = None
    if spec.data_files is not None and (spec.path is None or spec.path in FILE_LOADERS):
        files = spec.data_files
        named = _of_split(files, spec, "data_files") if isinstance(files, Mapping) else files
    elif spec.path is not None and (Path(spec.path).suffix.lower() in READERS or Path(spec.path).is_file()):
        named = spec.path
    if named is None:
        return None
    patterns = [named] if isinstance(named, str) else list(named)
    return [path for pattern in patterns for path in _matching(pattern)]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [Path(pattern)]
    if "://" in pattern:
        raise DataError(f"{pattern}: files are read from this machine. Download it, or name a data set of the Hub.")
    if path.is_dir():
        raise DataError(f"{pattern}: this is a folder. Name its files ({pattern}/*.jsonl), or give it as the `path`.")
    found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(pattern) else []
    if not found:
        raise DataError(_not_found(pattern, path))
    return [Path(name) for name in found]


def _not_found(pattern: str, path: Path) -> str:
    folder = path.parent
    if glob.has_magic(pattern):
        return f"{pattern}: no file matches. Check the pattern and the folder you are in."
    if not folder.is_dir():
        return f"{pattern}: the folder {folder} does not exist. Check the path and the folder you are in."
    names = sorted(item.name for item in folder.iterdir())
    return f"{pattern}: there is no such file.{nearest(path.name, names)} Check the path and the folder you are in."


# The datasets library


def _is_saved_folder(path: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file()


def _saved_folder(spec: DataSpec) -> Any:
    import datasets

    try:
        table = datasets.load_from_disk(str(spec.path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = _first_line(error)
        raise DataError(f"{spec.path}: the saved data set cannot be read: {reason}. Save it again.") from None
    return _of_split(table, spec, str(spec.path)) if isinstance(table, Mapping) else table


def _hub(spec: DataSpec) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            spec.path,
            spec.name,
            data_dir=spec.data_dir,
            data_files=spec.data_files,
            split=spec.split,
            revision=spec.revision,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{spec.path} [{spec.split}]: the data set cannot be loaded: {_first_line(error)}. Check its name, its "
            "split and the network; files on this machine go into `data_files`, which names a bad row by its line."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
