"""Numbers that papers have published, from YAML files, to stand beside measured ones and be told apart from them.

A file holds tables. What all cells of a table share is said once; its rows are methods, its columns differ in one of
``data``, ``metric`` and ``setting``:

    paper: FSLoRA
    arxiv: '2501.19389'
    tables:
      - table: v1 Table 5.1
        model: roberta-base
        metric: accuracy
        unit: '%'
        column: data
        columns: [sst2, qqp]
        rows:
          FSLoRA: [93.5, {value: 85.8, status: unconfirmed}]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from fedloom.platform.bounded_yaml import MAX_TEXT_BYTES, parse_yaml
from fedloom.platform.errors import PublishedError, clipped
from fedloom.platform.experiment_world import Section
from fedloom.platform.reading import read_bounded

Status = Literal["published", "unconfirmed"]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedNumber:
    """One number of a paper.

    Attributes:
        arxiv: identifier, e.g. ``2501.19389``.
        table: table, section or other place where it stands, with the paper's version.
        model: base model as an experiment names it; ``None`` where it is not said or of no matter, as are ``data`` and
            ``setting``.
        method: as the paper calls it.
        unit: of ``value``.
        status: ``unconfirmed``: second hand, or in doubt.
        note: what to know before comparing with it; may be empty.
    """

    paper: str
    arxiv: str
    table: str
    model: str | None
    data: str | None
    method: str
    setting: str | None
    metric: str
    value: float
    unit: str
    status: Status
    note: str


class _Cell(Section):
    value: float
    status: Status


class _Table(Section):
    table: Text
    model: Text | None = None
    data: Text | None = None
    setting: Text | None = None
    metric: Text | None = None
    unit: Text
    status: Status = "published"
    note: str = ""
    column: Literal["data", "metric", "setting"]
    columns: tuple[Text, ...] = Field(min_length=1)
    rows: dict[str, tuple[float | _Cell, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if getattr(self, self.column) is not None:
            raise ValueError(
                f"the columns differ in {self.column!r}, which is also said for all; leave one of them out"
            )
        if self.metric is None and self.column != "metric":
            raise ValueError("it has no metric; say one for all, or let the columns differ in it")
        for method, cells in self.rows.items():
            if len(cells) != len(self.columns):
                raise ValueError(f"row {method!r} has {len(cells)} values for {len(self.columns)} columns")
        return self


class _File(Section):
    paper: Text
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")]
    tables: tuple[_Table, ...] = Field(min_length=1)


def load_published(path: Path) -> tuple[PublishedNumber, ...]:
    """Read a file of published numbers, table by table, row by row.

    Raises:
        PublishedError: it cannot be read, or a key or a value is wrong.
    """
    name = clipped(path.name)
    try:
        document = parse_yaml(read_bounded(path, MAX_TEXT_BYTES).decode("utf-8"))
        file = _File.model_validate(document)
    except ValidationError as error:
        raise PublishedError("\n".join(_lines(error, name))) from error
    except yaml.YAMLError as error:
        raise PublishedError(f"{name}: not valid YAML: {clipped(' '.join(str(error).split()), 400)}") from error
    except (OSError, ValueError) as error:
        raise PublishedError(f"{name}: cannot be read as published numbers: {clipped(error)}") from error
    return tuple(number for table in file.tables for number in _numbers(file, table))


def _numbers(file: _File, table: _Table) -> list[PublishedNumber]:
    numbers = []
    for method, cells in table.rows.items():
        for column, cell in zip(table.columns, cells, strict=True):
            shared = {"model": table.model, "data": table.data, "setting": table.setting, "metric": table.metric}
            at = shared | {table.column: column}
            numbers.append(
                PublishedNumber(
                    paper=file.paper,
                    arxiv=file.arxiv,
                    table=table.table,
                    model=at["model"],
                    data=at["data"],
                    method=method,
                    setting=at["setting"],
                    metric=str(at["metric"]),
                    value=cell.value if isinstance(cell, _Cell) else cell,
                    unit=table.unit,
                    status=cell.status if isinstance(cell, _Cell) else table.status,
                    note=table.note,
                )
            )
    return numbers


def _lines(error: ValidationError, name: str) -> list[str]:
    """Say every mistake, with the key where it stands."""
    lines = []
    for detail in error.errors(include_url=False)[:20]:
        key = clipped(".".join(map(str, detail["loc"])))
        said = clipped(detail["msg"].removeprefix("Value error, "), 400)
        lines.append(f"{name}{f', key {key}' if key else ''}: {said[:1].lower() + said[1:]}")
    return lines
