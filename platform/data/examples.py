"""From rows to examples: which columns are read, which rows are held out, and what the labels are called."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.platform.data.federated import Int64
from fedloom.platform.data.source import Rows
from fedloom.platform.data.templates import alpaca_prompts
from fedloom.platform.errors import DataError, clipped, nearest
from fedloom.platform.experiment_data import Columns, DataSection, PartitionSection

_COLUMN = {name: field.default for name, field in Columns.model_fields.items()}
_SPLIT = {name: DataSection.model_fields[name].default for name in ("train_split", "test_split")}
NEEDS_LABEL = ("dirichlet", "shards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The rows that an experiment uses, mapped and checked but not yet tokenised; row i is the source's ``rows[i]``.

    Attributes:
        rows: int64 (n,): positions in the source, the training examples first.
        num_train: how many of them are training examples.
        prompts: what comes before the text: the causal_lm's prompt, or the first of two texts to classify; else
            empty strings.
        texts: the text to classify, or the completion to learn.
        labels: int64: the classes of all examples (classification), of the training examples (a causal_lm whose
            partition needs them), or empty.
        label_names: the classes by index.
        clients: the natural client id of every training example; empty unless the partition is natural.
    """

    rows: Int64
    num_train: int
    prompts: Sequence[str]
    texts: Sequence[str]
    labels: Int64
    label_names: tuple[str, ...]
    clients: Sequence[str | int]


def map_examples(rows: Rows, data: DataSection, partition: PartitionSection) -> Examples:
    """Read the columns that the task and the partition need, and divide the rows into training and test.

    Raises:
        DataError: for a missing column, value or split, or a label that only the test split has.
    """
    roles = _roles(rows, data)
    for role, column in roles.items():
        rows.require(role, column)
    label = _label_column(rows, data, partition)
    client = _client_column(rows, data, partition)
    train, test = _split(rows, data, roles)
    used = np.concatenate([train, test])
    read = {role: rows.texts(role, column, used) for role, column in roles.items()}
    prompts, texts = _prompts_and_texts(read, data)
    labels: Int64 = np.empty(0, np.int64)
    label_names: tuple[str, ...] = ()
    if label is not None:
        labels, label_names = _labels(rows, label, train, test if data.task == "classification" else test[:0])
    return Examples(
        rows=used,
        num_train=len(train),
        prompts=prompts,
        texts=texts,
        labels=labels,
        label_names=label_names,
        clients=[] if client is None else _class_names(rows, client, rows.names("client", client, train)),
    )


def _roles(rows: Rows, data: DataSection) -> dict[str, str]:
    """Return the columns of text that are read, by role; they also decide what is held out."""
    columns = data.columns
    if data.task == "classification":
        return {"text": columns.text} | ({} if columns.text_pair is None else {"text_pair": columns.text_pair})
    if data.template is None and _completion_is_text(rows, columns):
        return {"text": columns.text}
    given = {} if columns.input is None else {"input": columns.input}
    return {"prompt": columns.prompt, **given, "completion": columns.completion}


def _prompts_and_texts(read: Mapping[str, Sequence[str]], data: DataSection) -> tuple[Sequence[str], Sequence[str]]:
    """Return what :class:`Examples` calls prompts and texts, from what was read by role."""
    if "text_pair" in read:
        return read["text"], read["text_pair"]
    if "text" in read:
        return [""] * len(read["text"]), read["text"]
    if data.template == "alpaca":
        return alpaca_prompts(read["prompt"], read.get("input")), read["completion"]
    return read["prompt"], read["completion"]


def _completion_is_text(rows: Rows, columns: Columns) -> bool:
    """Whether causal_lm learns `text` with no prompt: nobody named other columns, and there are none."""
    default = (columns.prompt, columns.completion) == (_COLUMN["prompt"], _COLUMN["completion"])
    absent = {columns.prompt, columns.completion}.isdisjoint(rows.columns)
    return default and absent and columns.text in rows.columns


def _label_column(rows: Rows, data: DataSection, partition: PartitionSection) -> str | None:
    if data.task == "classification":
        rows.require("label", data.columns.label)
        return data.columns.label
    if partition.kind in NEEDS_LABEL:
        rows.require("label", data.columns.label, f", which partition.kind {partition.kind!r} needs")
        return data.columns.label
    return None


def _client_column(rows: Rows, data: DataSection, partition: PartitionSection) -> str | None:
    if partition.kind != "natural":
        return None
    column = data.columns.client or ("client" if rows.builtin else None)
    if column is None:
        raise DataError(
            "key partition.kind: 'natural' needs data.columns.client, the column that says whose a row is. "
            f"Columns of {rows.name}: {clipped(', '.join(rows.columns), 1000)}. "
            "Or set partition.kind to iid, dirichlet, shards or quantity, with partition.num_clients."
        )
    rows.require("client", column)
    return column


def _class_names(rows: Rows, column: str, values: Sequence[str | int]) -> list[str | int]:
    """Replace the integers of a declared class by its name; other values stay."""
    names = rows.class_names(column)
    return [names[int(value)] for value in values] if names else list(values)


def _labels(rows: Rows, column: str, train: Int64, test: Int64) -> tuple[Int64, tuple[str, ...]]:
    """Return the class of every row, and the names of the classes: all labels that training rows have, in order."""
    values = rows.names("label", column, np.concatenate([train, test]))
    declared = rows.class_names(column)
    known = sorted(set(values[: len(train)]))  # a column is of one type
    names = tuple(declared[int(value)] if declared else str(value) for value in known)
    if len(names) < 2:
        raise DataError(
            f"key data.columns.label: every training example of {rows.name} has the label "
            f"{clipped(repr(names[0]))} in column {column!r}; at least two labels are needed."
        )
    index = {value: i for i, value in enumerate(known)}
    for value, row in zip(values[len(train) :], test, strict=True):
        if value not in index:
            word = declared[int(value)] if declared else str(value)
            raise DataError(
                f"key data.columns.label: {rows.place(int(row))} is a test example with the label "
                f"{clipped(repr(word))}, which no training "
                f"example has.{nearest(word, names)} Labels: {clipped(', '.join(names), 1000)}."
            )
    return np.array([index[value] for value in values], np.int64), names


def _split(rows: Rows, data: DataSection, roles: Mapping[str, str]) -> tuple[Int64, Int64]:
    """Return the rows of the training and of the test split."""
    if data.train_split == data.test_split:
        raise DataError(f"key data.test_split: {data.test_split!r} is also data.train_split; they must differ.")
    splits = _splits(rows, data)
    known = sorted(set(splits or ()))
    for key, split in (("train_split", data.train_split), ("test_split", data.test_split)):
        by_default = data.columns.split is None and split == _SPLIT[key]
        if split not in known and not (by_default and (splits is None or key == "test_split")):
            raise DataError(
                f"key data.{key}: {rows.name} has no split {split!r}.{nearest(split, known)} "
                f"Splits: {clipped(', '.join(known) or 'none', 1000)}."
            )
    if data.test_split in known:
        return _rows_of(splits, data.train_split), _rows_of(splits, data.test_split)
    among = np.arange(len(rows.table)) if splits is None else _rows_of(splits, data.train_split)
    return _cut(rows, data, roles, among)


def _splits(rows: Rows, data: DataSection) -> list[str] | None:
    """Name the split of every row; None where the source does not say."""
    column = data.columns.split
    if column is None and rows.parts:
        return [name for name, size in rows.parts for _ in range(size)]
    if column is None and "split" in rows.columns and rows.is_text("split"):
        column = "split"
    if column is None:
        return None
    rows.require("split", column)
    splits = [str(name) for name in _class_names(rows, column, rows.names("split", column, range(len(rows.table))))]
    asked = {data.train_split, data.test_split}
    # A column that nobody named, and that lacks one of two words that nobody chose, means something else.
    by_default = data.columns.split is None and asked == set(_SPLIT.values())
    return None if by_default and not asked.issubset(splits) else splits


def _rows_of(splits: Sequence[str] | None, split: str) -> Int64:
    return np.flatnonzero([name == split for name in splits or ()])


def _cut(rows: Rows, data: DataSection, roles: Mapping[str, str], among: Int64) -> tuple[Int64, Int64]:
    """Hold out `test_fraction` of these rows by the hash of what they say."""
    texts = [rows.texts(role, column, among) for role, column in roles.items()]
    held_out = np.array([_is_held_out(parts, data.test_fraction) for parts in zip(*texts, strict=True)], bool)
    train, test = among[~held_out], among[held_out]
    for part, kind in ((train, "training"), (test, "test")):
        if len(part) == 0:
            raise DataError(
                f"key data.test_fraction: {data.test_fraction} of the {len(among)} rows of {rows.name} leaves no "
                f"{kind} example. Bring more rows, or a column that names each row's split (data.columns.split)."
            )
    return train, test


def _is_held_out(texts: Sequence[str], fraction: float) -> bool:
    """Decide by content alone, so that added rows move no other row and equal texts stay on one side."""
    digest = hashlib.sha256("\x1f".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
