"""The ledger: bytes, operations and simulated seconds of every client and round, and their totals."""

import dataclasses
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedloom.platform.record import Record


def round_latency_s(records: Sequence[Record], deadline_s: float | None) -> float:
    """Return the simulated length of a round: that of the slowest accepted client.

    If the deadline cut somebody, the server has waited until then.
    """
    if deadline_s is not None and any(is_late(record) for record in records):
        return deadline_s
    return max((record.latency_s for record in records if record.refused is None), default=deadline_s or 0.0)


def is_late(record: Record) -> bool:
    """Whether the deadline cut this client's update."""
    return record.fault == "late"


def totals(records: Sequence[Record]) -> dict[str, float]:
    """Return a round's traffic, operations, accepted and cut updates, and its example-weighted loss.

    Without an accepted update the loss is NaN.
    """
    accepted = [record for record in records if record.refused is None]
    weight = sum(record.num_examples for record in accepted)
    kinds = Counter(record.fault for record in records if record.fault is not None and not is_late(record))
    refused = {f"refused/{kind}": count for kind, count in kinds.items()}
    loss = sum(record.loss * record.num_examples for record in accepted) / weight if weight else math.nan
    return {
        "train/loss": loss,
        "bytes/down": sum(record.bytes_down for record in records),
        "bytes/up": sum(record.bytes_up for record in records),
        "updates": len(accepted),
        "stragglers": sum(is_late(record) for record in records),
        "retries": sum(record.retries for record in records),
        **refused,
    }


def clock_totals(records: Sequence[Record], deadline_s: float | None) -> dict[str, float]:
    """Return a round on the simulated clock: its latency, split as the slowest accepted client spent it.

    ``sim/wait_s`` is what the server waited for clients that the deadline cut.
    """
    accepted = [record for record in records if record.refused is None]
    latency_s = round_latency_s(records, deadline_s)
    split = dict.fromkeys(("sim/download_s", "sim/compute_s", "sim/upload_s"), 0.0)
    if accepted:
        slowest = max(accepted, key=lambda record: record.latency_s)
        split = {name: float(getattr(slowest, name.removeprefix("sim/"))) for name in split}
    facts = {
        "sim/round_s": latency_s,
        **split,
        "sim/wait_s": max(0.0, latency_s - sum(split.values())),
        "sim/flop": sum(record.flop for record in records),
        "ratio/mean": float(np.mean([record.ratio for record in records])) if records else math.nan,
        "ratio/min": min((record.ratio for record in records), default=math.nan),
    }
    energy_j = sum(record.energy_j for record in records)
    return facts | ({"sim/energy_j": energy_j} if energy_j else {})


def ledger_bytes(rounds: Iterable[tuple[int, Sequence[Record]]]) -> bytes:
    """Return a Parquet file with one row per round and client: the fields of ``Record``, the round and the latency."""
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"round": number, **dataclasses.asdict(record), "latency_s": record.latency_s}
        for number, records in rounds
        for record in records
    ]
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema(pyarrow)), sink)
    return sink.getvalue()


def _schema(pyarrow: Any) -> Any:
    text = pyarrow.string()
    kinds = {"str": text, "str | None": text, "int": pyarrow.int64(), "float": pyarrow.float64()}
    names = {field.name: _type_name(field.type) for field in dataclasses.fields(Record)}
    fields = {"round": "int", **names, "latency_s": "float"}
    return pyarrow.schema([(name, kinds[kind]) for name, kind in fields.items()])


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
