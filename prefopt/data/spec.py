"""What to load: one value that names files, a data set, rows in memory, or a mixture of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prefopt.errors import RecipeError, nearest

FileNames = str | Sequence[str]


@dataclass(frozen=True)
class DataSpec:
    """Names one source, or a mixture of sources. Says exactly one of `path`, `data_files`, `rows`, `mixture`.

    `path` is a data set of the Hub, a local folder, or a folder written by `save_to_disk`; `name`, `data_dir` and
    `revision` go with it, and `data_files` may (then they lie inside it). `data_files` alone are local files: a name, a
    pattern, a list, or these by split. `columns` keeps only these of the source's columns; `column_names` maps our
    names to the source's, `{prompt: question}`. `fraction` in (0, 1] keeps a sample of the rows, the same for the same
    `seed`. `test_split_size` (a share, or a number of examples) is set aside by `load_train_test`, which otherwise
    loads `test_split`. `targets` names a second stream of single answers, which a loss imitates beside the pairs.
    """

    path: str | None = None
    name: str | None = None
    data_dir: str | None = None
    data_files: FileNames | Mapping[str, FileNames] | None = None
    revision: str | None = None
    rows: Any = None
    rows_name: str = "rows"
    mixture: Sequence[DataSpec] = ()
    split: str = "train"
    test_split: str | None = None
    test_split_size: float | int | None = None
    columns: Sequence[str] | None = None
    column_names: Mapping[str, str] = field(default_factory=dict)
    fraction: float | None = None
    seed: int = 0
    targets: DataSpec | None = None

    def __post_init__(self) -> None:
        said = [name for name in ("path", "data_files", "rows") if getattr(self, name) is not None]
        if bool(said) == bool(self.mixture) or (self.rows is not None and len(said) > 1):
            raise RecipeError("data: name one source: a data set, data files, rows, or a mixture of entries")
        if self.path is None and (self.name or self.data_dir or self.revision):
            raise RecipeError("data: `name`, `data_dir` and `revision` go with a data set's `path`, which is missing")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise RecipeError(f"data: fraction is {self.fraction}; write a number above 0 and at most 1")
        if len(set(self.column_names.values())) < len(self.column_names):
            raise RecipeError("data: column_names takes two of our columns from one of theirs; copy the column first")
        self._check_test_size()
        self._check_mixture()

    def _check_test_size(self) -> None:
        size = self.test_split_size
        if size is None:
            return
        if isinstance(size, float) and not 0 < size < 1:
            raise RecipeError(f"data: test_split_size is {size}; write a share between 0 and 1, or a whole number")
        if size < 1 and isinstance(size, int):
            raise RecipeError(f"data: test_split_size is {size}; write at least 1, or a share between 0 and 1")

    def _check_mixture(self) -> None:
        own = [name for name in ("columns", "column_names", "fraction") if self.mixture and getattr(self, name)]
        if own:
            raise RecipeError(f"data: `{own[0]}` stands beside a mixture; write it in each entry it is meant for")
        for entry in self.mixture:
            if entry.mixture or entry.test_split_size is not None or entry.targets is not None:
                raise RecipeError("data: an entry of a mixture is one source, without a mixture, test split or targets")

    @property
    def title(self) -> str:
        """The source's name in reports."""
        if self.rows is not None:
            return self.rows_name
        files = self.data_files.get(self.split, "") if isinstance(self.data_files, Mapping) else self.data_files
        listed = files if isinstance(files, str) else ", ".join(files or ())
        return " ".join(part for part in (self.path, self.name, listed) if part)

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any], **defaults: Any) -> DataSpec:
        """A source from a block such as `{path: ..., split: ..., fraction: 0.5}`; unknown keys are refused."""
        known = [item.name for item in fields(cls) if item.name not in ("rows", "rows_name", "mixture", "targets")]
        for key in entry:
            if key not in known:
                raise RecipeError(f"data: `{key}` is not known.{nearest(key, known)} Known: {', '.join(known)}")
        return cls(**{**defaults, **entry})
