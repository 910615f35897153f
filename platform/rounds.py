"""Finished rounds, as values and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.platform.evaluation import ClientScore
from fedloom.platform.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished round; number 0 is the untrained model, evaluated. The last one has the ``clients``' own scores."""

    number: int
    metrics: Mapping[str, float]
    records: Sequence[Record] = field(default_factory=tuple)
    clients: Sequence[ClientScore] = field(default_factory=tuple)


def round_to_json(done: Round) -> dict[str, Any]:
    """Return a round as JSON values; floats keep every bit, NaN and infinities included."""
    return dataclasses.asdict(done)


def round_from_json(values: Mapping[str, Any]) -> Round:
    """Undo :func:`round_to_json`.

    Raises:
        KeyError, TypeError: values that are no round's.
    """
    return Round(
        number=values["number"],
        metrics=values["metrics"],
        records=[Record(**record) for record in values["records"]],
        clients=[ClientScore(**score) for score in values["clients"]],
    )
