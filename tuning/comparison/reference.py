"""Published numbers beside measured ones: a file of entries, each with its source, or a paper's tables."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedloom.platform.bounded_yaml import MAX_TEXT_BYTES, parse_yaml
from fedloom.platform.errors import nearest
from fedloom.platform.reading import read_bounded
from fedloom.platform.registry import method_class, method_names
from fedloom.tuning.comparison.groups import METHOD, Group
from fedloom.tuning.comparison.runs import ComparisonError
from fedloom.tuning.published import PublishedNumber, load_published

METRICS = {  # name in the file: (name in tables, largest value)
    "accuracy": ("accuracy", 1.0),
    "loss": ("loss", math.inf),
    "bytes_up": ("bytes up", math.inf),
    "bytes_down": ("bytes down", math.inf),
    "bytes_total": ("bytes", math.inf),
    "sim_seconds": ("simulated s", math.inf),
    "seconds": ("real s", math.inf),
}
KEYS = ("group", "metric", "value", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One number of a paper: for groups whose label matches the shell pattern ``group``."""

    group: str
    metric: str
    value: float
    source: str

    def fits(self, group: Group) -> bool:
        """Whether it speaks of a group."""
        return fnmatch.fnmatchcase(group.label, self.group)

    @property
    def words(self) -> str:
        """What it says, e.g. ``accuracy 81.2%``."""
        value = f"{self.value:.1%}" if self.metric == "accuracy" else f"{self.value:g}"
        return f"{METRICS[self.metric][0]} {value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTable:
    """One cell of a paper's table: for groups of its method on its base model and its data, as the paper names them."""

    number: PublishedNumber

    def fits(self, group: Group) -> bool:
        """Whether it speaks of a group."""
        settings, number = group.runs[0].parameters, self.number
        name = settings[METHOD]
        method = method_class(name).traits.title if name in method_names() else name
        trained_on = f"{settings['data.source']} {settings.get('data.subset', '')}".casefold()
        return (
            number.method.casefold().startswith(method.casefold())
            and number.model == settings["model.name"]
            and (number.data is None or number.data.casefold() in trained_on)
        )

    @property
    def group(self) -> str:
        """Where it comes from, for a note if nothing measured fits it."""
        return f"{self.number.paper}, {self.number.table}"

    @property
    def metric(self) -> str:
        """As the paper calls it."""
        return self.number.metric

    @property
    def value(self) -> float:
        """In the paper's unit."""
        return self.number.value

    @property
    def words(self) -> str:
        """What it says, e.g. ``MMLU accuracy 30.42 % (FLoRIST-O, homogeneous)``."""
        number = self.number
        facts = [number.method, number.data, number.setting, "unconfirmed" if number.status == "unconfirmed" else None]
        return f"{number.metric} {number.value:g} {number.unit} ({', '.join(fact for fact in facts if fact)})"

    @property
    def source(self) -> str:
        """The paper and the table, and what to know before comparing."""
        note = f"; {self.number.note}" if self.number.note else ""
        return f"{self.number.paper}, arXiv:{self.number.arxiv}, {self.number.table}{note}"


Reference = Published | OfTable


def read_reference(path: Path) -> Sequence[Reference]:
    """Read a file of published numbers: entries, or the tables of a paper (:mod:`fedloom.tuning.published`).

    Raises:
        ComparisonError: it cannot be read, or an entry is malformed; it names the entry and the key.
        PublishedError: likewise, in a paper's tables.
    """
    place = f"--reference {path}"
    try:
        document = parse_yaml(read_bounded(path, MAX_TEXT_BYTES).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ComparisonError(f"{place}: cannot be read: {reason}") from error
    if not isinstance(document, dict):
        raise ComparisonError(f"{place}: holds no mapping with the keys 'source' and 'published'")
    if "tables" in document:
        return [OfTable(number=number) for number in load_published(path)]
    _check_keys(document, ("source", "published"), place)
    entries = document.get("published")
    if not isinstance(entries, list) or not entries:
        raise ComparisonError(f"{place}, key published: a list with at least one entry is needed, got {entries!r}")
    return [_entry(entry, document.get("source"), f"{place}, entry {n}") for n, entry in enumerate(entries, start=1)]


def _entry(entry: Any, source: Any, place: str) -> Published:
    if not isinstance(entry, dict):
        raise ComparisonError(f"{place}: is {entry!r}, not a mapping with the keys {', '.join(KEYS)}")
    _check_keys(entry, KEYS, place)
    values = {"source": source, **entry}
    for key in ("group", "metric", "source"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise ComparisonError(f"{place}, key {key}: a text is needed, got {values.get(key)!r}")
    metric, value = values["metric"], values.get("value")
    if metric not in METRICS:
        raise ComparisonError(f"{place}, key metric: no metric {metric!r}.{nearest(metric, METRICS)} {_known(METRICS)}")
    largest = METRICS[metric][1]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= min(largest, 1e18):
        allowed = "a share between 0 and 1, such as 0.812" if largest == 1 else "a number from 0 to 1e18"
        raise ComparisonError(f"{place}, key value: {allowed} is needed for {metric}, got {value!r}")
    return Published(group=values["group"], metric=metric, value=float(value), source=values["source"].strip())


def _check_keys(found: Mapping[Any, Any], known: Sequence[str], place: str) -> None:
    for key in found:
        if key not in known:
            raise ComparisonError(f"{place}: unknown key {key!r}.{nearest(str(key), known)} {_known(known)}")


def _known(names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"Known: {', '.join(names)}."
