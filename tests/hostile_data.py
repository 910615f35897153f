"""Data files for the fuzz tests: ten rows in every format, and what reading such a file gives."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hostile import outcome
from pyarrow import parquet as pq
from test_data_errors import TOKENIZER

from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.experiment import Experiment

ROWS = [
    {"text": "good" if i % 2 else "bad", "label": "yes" if i % 2 else "no", "split": "test" if i > 7 else "train"}
    for i in range(10)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = ("text,label,split\n" + "".join(f"{','.join(row.values())}\n" for row in ROWS)).encode()


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return a file as other programs write it, without Arrow's own schema in it."""
    sink = io.BytesIO()
    pq.write_table(table, sink, store_schema=False, **options)
    return sink.getvalue()


def repeated(text: str, count: int) -> pa.Array:
    """Return a column that holds a text once and says how often."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


PARQUET = parquet_bytes(pa.Table.from_pylist(ROWS))
FILES = {"a.jsonl": JSONL, "a.json": json.dumps(ROWS).encode(), "a.csv": CSV}
LOADING = "from fedloom.platform.data.source import load_rows\nfrom fedloom.platform.experiment_data import DataSection"


def read(folder: Path, name: str, content: bytes, **data: Any) -> Any:
    """Return the federated data of a file, or an error of ours; nothing is left beside it."""
    (folder / name).write_bytes(content)
    before = sorted(folder.iterdir())
    found = prepared(folder / name, **data)
    assert sorted(folder.iterdir()) == before
    return found


def prepared(source: Path | str, **data: Any) -> Any:
    document = {"data": {"source": str(source), **data}, "partition": {"kind": "iid", "num_clients": 2}}
    return outcome(lambda: prepare_data(Experiment.model_validate(document), TOKENIZER))
