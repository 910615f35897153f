"""Whatever lies in a folder of data or stands on its card: nothing else is read, and each file is looked at."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from hostile_data import CSV, JSONL, PARQUET, ROWS, prepared

from fedloom.platform.data.guard import MAX_DEPTH
from fedloom.platform.errors import FedloomError


def in_folder(path: Path, card: str = "", **files: bytes) -> Any:
    path.mkdir(exist_ok=True)
    (path / "README.md").write_text(card)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return prepared(path)


def test_a_folder_is_read_with_and_without_a_card(tmp_path):
    """Also one whose card names its files, by patterns, and says more than that."""
    card = """---
license: mit
tags: [a, 'b::c']
configs:
- config_name: default
  data_files: [{split: train, path: 'tr*.jsonl'}, {split: test, path: test.jsonl}]
---
# Card
"""
    for name, content, head in (
        ("jsonl", JSONL, ""),
        ("csv", CSV, ""),
        ("parquet", PARQUET, ""),
        ("jsonl", JSONL, card),
    ):
        files = {f"train_{name}": content, f"test_{name}": content}
        data = in_folder(tmp_path / f"{name}{len(head)}", head, **files)
        assert len(data.offsets) == 1 + 2 * len(ROWS)


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "place",
    [
        "https://example.invalid/a.jsonl",
        "../b.jsonl",
        "/etc/*.json",
        "a/../../b.jsonl",
        "~/b.jsonl",
        "zip://a.jsonl::b",
    ],
)
@pytest.mark.parametrize("key", ["data_files: {}", "data_files: [{{split: train, path: [{}]}}]", "data_dir: {}"])
def test_a_card_that_names_files_elsewhere_is_refused(tmp_path, card, place, key):
    """Before anything is asked for: whoever made the folder would choose what else is read."""
    path = tmp_path / "data"
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    head = f"configs:\n- config_name: default\n  {key.format(repr(place))}\n"
    path.mkdir()
    (path / card).write_text(head if card.startswith(".") else f"---\n{head}---\n")
    (path / "a.jsonl").write_bytes(JSONL)

    assert "lies out of the folder" in str(prepared(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + b"[" * 100_000, f"more than {MAX_DEPTH} levels"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0), "neither a list of objects nor"),
        ("a.csv", CSV + b"\0", "binary data"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.txt", b"good", "of another kind; known are json, csv, parquet"),
    ],
)
def test_files_of_a_folder_are_looked_at_one_by_one(tmp_path, name, content, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)

    with pytest.raises(FedloomError, match=message):
        raise prepared(tmp_path / "data")


@pytest.mark.parametrize("card", ["---\na: &a [1]\nb: *a\n---\n", "---\n- [\n---\n", "x" * (2**20 + 1)])
def test_a_card_out_of_bounds_is_refused(tmp_path, card):
    assert "README.md cannot be read" in str(in_folder(tmp_path / "data", card, train_jsonl=JSONL))
