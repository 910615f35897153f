"""From the rows of a task's source to questions in words, checked before a machine is asked for."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.platform.data.examples import Examples, map_examples
from fedloom.platform.data.federated import Int64
from fedloom.platform.data.source import Rows, load_rows
from fedloom.platform.data.tokens import MAX_CHARACTERS
from fedloom.platform.errors import DataError, clipped, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_data import DataSection
from fedloom.platform.experiment_tasks import PLACE, TaskSection, parts_of
from fedloom.platform.seeds import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A question in words.

    Attributes:
        place: the row it comes from, for messages.
        prompt: what the model reads.
        choices: multiple choice: the answers to choose from; else empty.
        right: multiple choice: the index of the right one.
        references: generation: the answers that count as right; else empty.
    """

    place: str
    prompt: str
    choices: tuple[str, ...] = ()
    right: int = 0
    references: tuple[str, ...] = ()


def worded(experiment: Experiment, index: int) -> list[Wording]:
    """Read the questions of the task ``evaluation.tasks[index]``, in the order of the source.

    Raises:
        DataError: a source, split, column or value that is missing or wrong, or an answer outside the choices.
    """
    task = experiment.evaluation.tasks[index]
    with _keys_of_task(index):
        rows, indices = _source(task) if task.source is not None else _held_out(experiment)
        _check_columns(rows, task)
    if task.max_examples is not None and task.max_examples < len(indices):
        order = torch.randperm(len(indices), generator=generator_for(experiment.seed, "evaluation", "task", task.name))
        indices = np.sort(indices[order[: task.max_examples].numpy()])
    reader = _Reader(key=f"key evaluation.tasks.{index}", rows=rows, task=task)
    chosen = rows.table.select(indices)
    return [reader.question(rows.place(int(row)), values) for row, values in zip(indices, chosen, strict=True)]


@contextlib.contextmanager
def _keys_of_task(index: int) -> Iterator[None]:
    """Name the keys of a task where the code that reads ``data`` would name those of ``data``."""
    try:
        yield
    except DataError as error:
        raise DataError(
            re.sub(r"key data\.(columns\.)?", f"key evaluation.tasks.{index}.", str(error), count=1)
        ) from error


def _held_out(experiment: Experiment) -> tuple[Rows, Int64]:
    """Return the rows of the experiment's own data, and which of them are held out; they have been read before."""
    rows = load_rows(experiment.data)
    examples = map_examples(rows, experiment.data, experiment.partition)
    if experiment.data.template is not None:
        rows = _with_prompts(rows, examples)
    return rows, examples.rows[examples.num_train :]


def _with_prompts(rows: Rows, examples: Examples) -> Rows:
    """Put what training gives the model before the answer, wording included, into the column ``prompt``."""
    prompts = [""] * len(rows.table)
    for index, prompt in zip(examples.rows.tolist(), examples.prompts, strict=True):
        prompts[index] = prompt
    others = rows.table.remove_columns([name for name in rows.columns if name == "prompt"])
    return replace(rows, table=others.add_column("prompt", prompts))


def _source(task: TaskSection) -> tuple[Rows, Int64]:
    """Return the rows of a task's own source, and which of them are its questions."""
    assert task.source is not None, "the caller asks for the held-out examples otherwise"
    split = task.split or "test"  # of a dataset that has it, no other split is read
    rows = load_rows(DataSection(source=task.source, subset=task.subset, train_split=split, test_split=split))
    if task.split is None and not rows.parts:
        return rows, np.arange(len(rows.table))
    if rows.parts:
        names = [name for name, size in rows.parts for _ in range(size)]
    else:
        rows.require("split", "split", f", in which split {task.split!r} could be found")
        names = [str(name) for name in rows.names("split", "split", range(len(rows.table)))]
    found = np.flatnonzero([name == split for name in names])
    if len(found) == 0:
        known = sorted(set(names))
        raise DataError(
            f"key data.split: {rows.name} has no split {split!r}.{nearest(split, known)} "
            f"Splits: {clipped(', '.join(known), 1000)}."
        )
    return rows, found


def _check_columns(rows: Rows, task: TaskSection) -> None:
    places = {"prompt": _in_templates((task.prompt,)), "answer": [task.answer]}
    if task.kind == "multiple_choice":
        places |= {"choices": _places(task.choices), "labels": _places(task.labels or ())}
    for key, named in places.items():
        for place in named:
            if _column(place, rows.columns) is None:
                raise DataError(
                    f"key data.{key}: {rows.name} has no column {place!r}.{nearest(place, rows.columns)} "
                    f"Columns: {clipped(', '.join(rows.columns), 1000)}."
                )


def _places(choices: str | tuple[str, ...]) -> list[str]:
    """Return the columns that choices refer to: a column that holds them all, or those in their templates."""
    return [choices] if isinstance(choices, str) else _in_templates(choices)


def _in_templates(templates: Sequence[str]) -> list[str]:
    return [place for template in templates for _, place in parts_of(template) if place is not None]


def _column(place: str, columns: Sequence[str]) -> str | None:
    """Return the column that a place lies in: the longest that fits, for names may hold dots."""
    match = PLACE.fullmatch(place)
    name = match[1] if match else place
    while name not in columns:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads one task's questions from rows; ``key`` begins its messages."""

    key: str
    rows: Rows
    task: TaskSection

    def question(self, where: str, row: Mapping[str, Any]) -> Wording:
        prompt = self._filled(self.task.prompt, "prompt", where, row)
        if self.task.kind == "generation":
            value = self._value(self.task.answer, "answer", where, row)
            several = value if isinstance(value, list) else [value]
            if not several:
                raise self._wrong("answer", where, f"has no answer in {self.task.answer!r}")
            references = tuple(self._text(each, self.task.answer, "answer", where) for each in several)
            return Wording(place=where, prompt=prompt, references=references)
        choices = self._choices(self.task.choices, "choices", where, row)
        if len(choices) < 2 or not all(choices):
            raise self._wrong(
                "choices", where, f"has the choices {clipped(choices)}; two or more are needed, none empty"
            )
        labels = None if self.task.labels is None else self._choices(self.task.labels, "labels", where, row)
        if labels is not None and len(labels) != len(choices):
            raise self._wrong("labels", where, f"has {len(choices)} choices, but {len(labels)} labels")
        return Wording(place=where, prompt=prompt, choices=choices, right=self._right(where, row, choices, labels))

    def _right(
        self, where: str, row: Mapping[str, Any], choices: tuple[str, ...], labels: tuple[str, ...] | None
    ) -> int:
        """Return the index of the right choice: by label, by index from 0, or word for word."""
        value = self._value(self.task.answer, "answer", where, row)
        word = self._text(value, self.task.answer, "answer", where)
        if labels is not None:
            names = labels
        elif isinstance(value, int):
            names = tuple(str(index) for index in range(len(choices)))
            word = str(int(value))
        else:
            names = choices if word in choices else tuple(str(index) for index in range(len(choices)))
        if word in names:
            return names.index(word)
        allowed = (
            f"one of the labels {clipped(labels)}"
            if labels is not None
            else (f"one of the choices {clipped(choices)} or an index from 0 to {len(choices) - 1}")
        )
        raise self._wrong("answer", where, f"has the answer {clipped(repr(value))}; it must be {allowed}")

    def _choices(self, given: str | tuple[str, ...], key: str, where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        if isinstance(given, tuple):
            return tuple(self._filled(template, key, where, row) for template in given)
        values = self._value(given, key, where, row)
        if not isinstance(values, list):
            raise self._wrong(key, where, f"has no list in {given!r}; name a column of lists, or write a template each")
        return tuple(self._text(value, given, key, where) for value in values)

    def _filled(self, template: str, key: str, where: str, row: Mapping[str, Any]) -> str:
        """Put a row's values into a template."""
        return "".join(
            text if place is None else text + self._text(self._value(place, key, where, row), place, key, where)
            for text, place in parts_of(template)
        )

    def _value(self, place: str, key: str, where: str, row: Mapping[str, Any]) -> Any:
        """Return what a row has in a column or a part of one."""
        match, column = PLACE.fullmatch(place), _column(place, self.rows.columns)
        assert match is not None, "checked with the experiment"
        assert column is not None, "checked with the columns"
        value: Any = row[column]
        inner = match[1][len(column) + 1 :]
        for part in inner.split(".") if inner else []:
            value = value.get(part) if isinstance(value, Mapping) else None
        for number in re.findall("[0-9]+", match[2]):
            value = value[int(number)] if isinstance(value, list) and int(number) < len(value) else None
        if value is None:
            raise self._wrong(key, where, f"has no value in {place!r}")
        return value

    def _text(self, value: Any, place: str, key: str, where: str) -> str:
        if not isinstance(value, str | int | float):
            raise self._wrong(key, where, f"has more than one value in {place!r}; name a part, e.g. {place}[0]")
        text = str(value)
        if len(text) > MAX_CHARACTERS:
            raise self._wrong(key, where, f"has a text of {len(text)} characters; at most {MAX_CHARACTERS} are read")
        return text

    def _wrong(self, key: str, where: str, problem: str) -> DataError:
        return DataError(f"{self.key}.{key}: {where} {problem}.")
