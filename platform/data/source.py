"""Where rows come from: the standard library's documentation, a local file, or a Hugging Face dataset."""

import dataclasses
import glob
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.platform.data.folder import check_folder, check_resolved
from fedloom.platform.data.guard import check_file
from fedloom.platform.data.quiet import quiet_datasets
from fedloom.platform.data.tokens import MAX_CHARACTERS
from fedloom.platform.errors import DataError, clipped, nearest
from fedloom.platform.experiment_data import DataSection

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""The loader of `datasets` by file extension."""

STDLIB = "builtin:stdlib"
_TEXT = ("string", "large_string")
_WHOLE = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a source, before anything is known about what they mean.

    Attributes:
        name: how messages call the source.
        table: a `datasets.Dataset`.
        parts: the splits of a dataset and their numbers of rows, in the order of the table; empty for a file.
        builtin: whether the source is our own, which brings its client and split columns.
    """

    name: str
    table: Any
    parts: tuple[tuple[str, int], ...] = ()
    builtin: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of the columns, sorted."""
        return sorted(self.table.column_names)

    def place(self, index: int) -> str:
        """Say where a row stands, counting from 1."""
        for part, size in self.parts:
            if index < size:
                return f"row {index + 1} of {self.name}, split {part!r},"
            index -= size
        return f"row {index + 1} of {self.name}"

    def require(self, role: str, column: str, purpose: str = "") -> None:
        """Raise DataError unless there is such a column.

        Args:
            role: the key under `data.columns` that names it.
            column: its name.
            purpose: what needs it, e.g. `, which partition.kind 'shards' needs`.
        """
        if column not in self.columns:
            raise DataError(
                f"key data.columns.{role}: {self.name} has no column {column!r}{purpose}."
                f"{nearest(column, self.columns)} Columns: {clipped(', '.join(self.columns), 1000)}."
            )

    def texts(self, role: str, column: str, indices: Collection[int]) -> list[str]:
        """Return the strings of a column at these rows; other types, missing values and huge texts are refused."""
        if not self.is_text(column):
            known = [name for name in self.columns if self.is_text(name)]
            raise DataError(
                f"key data.columns.{role}: column {column!r} of {self.name} holds {self._kind(column)}, not text. "
                f"Columns of text: {clipped(', '.join(known) or 'none', 1000)}."
            )
        texts = self._present(role, column, indices)
        for index, text in zip(indices, texts, strict=True):
            if len(text) > MAX_CHARACTERS:
                raise DataError(
                    f"key data.columns.{role}: {self.place(index)} has a text of {len(text)} characters in column "
                    f"{column!r}; at most {MAX_CHARACTERS} are read. Cut such texts."
                )
        return texts

    def names(self, role: str, column: str, indices: Iterable[int]) -> list[str | int]:
        """Return labels, client ids or split names: strings or integers; empty strings count as missing."""
        if not (self.is_text(column) or self.class_names(column) or self._dtype(column) in _WHOLE):
            raise DataError(
                f"key data.columns.{role}: column {column!r} of {self.name} holds {self._kind(column)}, "
                "neither strings nor integers."
            )
        return self._present(role, column, indices)

    def is_text(self, column: str) -> bool:
        """Whether a column holds strings."""
        return self._dtype(column) in _TEXT

    def class_names(self, column: str) -> list[str]:
        """Return the class names behind the integers of a column, for datasets that declare them; else empty."""
        return list(getattr(self.table.features[column], "names", None) or [])

    def _present(self, role: str, column: str, indices: Iterable[int]) -> list[Any]:
        values = self.table[column][:]
        chosen = []
        for index in indices:
            value = values[index]
            if value is None or (value == "" and role in {"label", "client", "split"}):
                raise DataError(f"key data.columns.{role}: {self.place(index)} has no value in column {column!r}.")
            if value == -1 and self.class_names(column):
                raise DataError(
                    f"key data.columns.{role}: {self.place(index)} has the class -1 in column {column!r}, which says "
                    "that it is withheld. Choose a split whose classes are published, e.g. data.test_split: validation."
                )
            chosen.append(value)
        return chosen

    def _dtype(self, column: str) -> str | None:
        return getattr(self.table.features[column], "dtype", None)

    def _kind(self, column: str) -> str:
        """Name the type of a column."""
        feature = self.table.features[column]
        kinds = {"Json": "values of different types", "List": "lists", "dict": "objects", "LargeList": "lists"}
        return kinds.get(type(feature).__name__) or str(self._dtype(column))


def load_rows(data: DataSection) -> Rows:
    """Read the source of an experiment.

    A file of at most ``guard.LARGEST_FILE_BYTES`` becomes a table in memory. Reading JSON or CSV takes less than
    256 MiB, 16 bytes for each cell and 16 times the file's size; reading Parquet less than 1 GiB and 96 times its size.
    :mod:`~fedloom.platform.data.guard` refuses what would take more; the files of a folder pass it one by one. What
    comes from the hub is trusted.

    Raises:
        DataError: if it does not exist, cannot be read, or is empty.
    """
    if not data.source.strip():
        raise DataError("key data.source: it is empty. Name a file, a hub dataset or 'builtin:stdlib'.")
    try:
        path = Path(data.source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a user that does not exist
        raise DataError(f"key data.source: {clipped(data.source)} cannot be looked up: {clipped(error)}") from error
    if data.source.startswith("builtin:"):
        rows = _load_builtin(data)
    elif path.suffix.lower() in LOADERS or (not path.is_dir() and is_local_source(data.source)):
        rows = _load_file(data, path)
    else:
        return _load_dataset(data, path)
    if data.subset is not None:
        raise DataError(
            f"key data.subset: {rows.name} has no subsets, only hub datasets have, got {data.subset!r}. Use null."
        )
    return rows


def is_local_source(source: str) -> bool:
    """Whether a source means a file or a folder, and neither a hub dataset nor the builtin data."""
    if source.startswith("builtin:"):
        return False
    path = Path(source).expanduser()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source, re.ASCII) is not None
    return path.exists() or path.suffix.lower() in LOADERS or not is_hub_id


def _load_builtin(data: DataSection) -> Rows:
    if data.source != STDLIB:
        raise DataError(f"key data.source: no builtin data called {data.source!r}. Known: {STDLIB}.")
    import datasets

    from fedloom.platform.builtin.stdlib_docs import stdlib_examples

    table = datasets.Dataset.from_list([dataclasses.asdict(example) for example in stdlib_examples()])
    return Rows(name=STDLIB, table=table, builtin=True)


def _load_file(data: DataSection, path: Path) -> Rows:
    if not path.exists():
        raise DataError(f"key data.source: there is no file {clipped(repr(data.source))}.{_nearest_file(path)}")
    loader = LOADERS.get(path.suffix.lower())
    if loader is None:
        raise DataError(
            f"key data.source: {clipped(path.name)} has the extension {clipped(repr(path.suffix))}, known are "
            f"{', '.join(LOADERS)}."
        )
    try:
        check_file(path, loader)
    except (OSError, ValueError) as error:
        said = f"{clipped(path.name)} cannot be read as {loader}: {clipped(error)}"
        raise DataError(f"key data.source: {said}") from error
    # In a CSV file "None" and "NA" are words, and an empty cell is an empty text.
    options = {"keep_default_na": False} if loader == "csv" else {}
    import datasets

    # The Arrow copy that `datasets` makes is read into memory and thrown away: files change, caches stay.
    with quiet_datasets(), tempfile.TemporaryDirectory(prefix="fedloom-data-") as cache:
        try:
            table = datasets.load_dataset(
                loader,
                data_files=glob.escape(str(path.resolve())),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:
            said = f"{clipped(path.name)} cannot be read as {loader}: {clipped(_reason(error))}"
            raise DataError(f"key data.source: {said}") from error
    return Rows(name=clipped(path.name), table=table)


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in LOADERS]
    except OSError:
        return ""
    return nearest(path.name, names)


def _load_dataset(data: DataSection, path: Path) -> Rows:
    """Load a hub dataset, or a folder that is laid out as one."""
    import datasets

    name, where = data.source, f"{data.source!r} is no file here, and as a hub dataset it"
    with tempfile.TemporaryDirectory(prefix="fedloom-data-") as cache, quiet_datasets():
        source, options = data.source, {}
        if path.is_dir():
            name, where = path.name, f"the folder {data.source!r}"
            check_folder(path)
            source, options = str(path.resolve()), {"cache_dir": cache, "keep_in_memory": True}
        try:
            if path.is_dir():
                check_resolved(path, datasets.load_dataset_builder(source, name=data.subset, cache_dir=cache))
            splits = datasets.load_dataset(source, name=data.subset, **options)
            chosen = [str(split) for split in splits]
            if data.columns.split is None and data.train_split in chosen:
                chosen = [split for split in chosen if split in {data.train_split, data.test_split}]
            table = datasets.concatenate_datasets([splits[split] for split in chosen])
        except DataError:
            raise
        except Exception as error:
            subset = f" with subset {data.subset!r}" if data.subset else ""
            raise DataError(f"key data.source: {where} cannot be loaded{subset}: {_reason(error)}") from error
    return Rows(name=name, table=table, parts=tuple((split, len(splits[split])) for split in chosen))


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, beneath the wrappers that `datasets` puts around it."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'it holds no rows.'}"
