"""Whatever a data file holds, the outcome is data or an error of ours, in bounded memory and in a living process."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hostile import HIGH_WATER, outcome, peak_bytes, peak_resident_bytes, tries
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq
from test_data_errors import TOKENIZER

from fedloom.platform.data import guard, tokens
from fedloom.platform.data.guard import CHUNK_BYTES, MAX_CELLS, MAX_COLUMNS, MAX_DEPTH, check_text
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.data.source import load_rows
from fedloom.platform.errors import FedloomError
from fedloom.platform.experiment import DataSection, Experiment

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
LOADING = "from fedloom.platform.data.source import load_rows\nfrom fedloom.platform.experiment import DataSection"
HOSTILE = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"null",
        b"NaN",
        b"1e400",
        b"9" * 5000,
        b"-",
        b"[",
        b"{",
        b'"',
        b"\\",
    ),
    *(
        b"[" * 70 + b"]" * 70,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b"\r",
        b"\n\n",
        b",,,,,",
        b"\xef\xbb\xbf",
        b"PK\x03\x04",
    ),
]
JUNK = st.binary(max_size=12) | st.sampled_from(HOSTILE)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([2**63, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


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


@pytest.mark.parametrize("name", FILES)
def test_the_untouched_files_are_read(folder, name):
    assert len(read(folder, name, FILES[name]).offsets) == 11


@tries(50)
@given(name=st.sampled_from(sorted(FILES)), start=st.integers(0, 600), size=st.integers(0, 9), junk=JUNK)
def test_a_file_with_bytes_replaced(folder, name, start, size, junk):
    read(folder, name, FILES[name][:start] + junk + FILES[name][start + size :])


@tries(50)
@given(value=JSON, key=st.sampled_from(["text", "label", "split", "other"]), listed=st.booleans())
def test_any_value_in_a_row(folder, value, key, listed):
    rows = [*ROWS, {**ROWS[0], key: value}]
    text = json.dumps(rows) if listed else "".join(json.dumps(row) + "\n" for row in rows)
    read(folder, "a.jsonl", text.encode())


@tries(50)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), name=st.sampled_from(sorted(FILES)))
def test_any_bytes(folder, content, name):
    read(folder, name, content)


@tries(100)
@given(source=st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "/" not in text))
def test_any_source_that_looks_like_a_file(source):
    for name in (f"{source}.jsonl", f"./{source}.csv"):
        outcome(lambda name=name: load_rows(DataSection(source=name)))


@tries(300)
@given(text=st.binary(max_size=50), depth=st.integers(0, 2 * MAX_DEPTH), cut=st.integers(1, 9))
def test_depth_is_counted_whatever_the_chunks(folder, text, depth, cut):
    """Brackets in strings do not count, and a chunk may end anywhere: also within an escape."""
    word = json.dumps(text.decode("latin-1") + '[{"\\')
    row = ('{"k":' + word + ',"d":' + "[" * depth + word + "]" * depth + "}").encode()
    shape = guard._JsonShape()

    def add_all() -> None:
        for start in range(0, len(row), cut):
            shape.add(row[start : start + cut])

    if depth + 1 > MAX_DEPTH:
        with pytest.raises(ValueError, match="levels are nested"):
            add_all()
    else:
        add_all()
        assert shape.num_rows == 1
    whole = guard._JsonShape()
    if depth + 1 <= MAX_DEPTH:
        whole.add(row)
        assert whole.num_columns == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"null", "neither a list of objects nor"),
        (JSONL + b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"more than {MAX_DEPTH} levels"),
        (b"[" * 100_000, f"more than {MAX_DEPTH} levels"),
        (JSONL + b'{"text": "\xff"}', "can't decode byte 0xff"),
        (JSONL + b'{"text": "\xed\xa0\x80"}', "can't decode byte 0xed"),
        (JSONL + b'{"text": "\\ud800"}', "cannot be read as json"),
        (JSONL + b"\0" * 9, "binary data"),
        (b"".join(b'{"k%d": 1}\n' % i for i in range(5000)), f"more than {MAX_COLUMNS} columns"),
        (JSONL[:-2] + b',"x":{' + b",".join(b'"k%d":1' % i for i in range(5000)) + b"}}\n", "columns"),
        (b"{%s}\n" % b",".join(b'"k%d":1' % i for i in range(4000)) + b"{}\n" * 70_000, f"more than {MAX_CELLS} cells"),
        (
            b'{"text": "' + b"x " * 600_000 + b'", "label": "no", "split": "train"}\n' + JSONL,
            "at most 1048576 are read",
        ),
    ],
)
def test_json_that_would_crash_or_grow_is_refused(folder, content, message):
    with pytest.raises(FedloomError, match=message):
        raise read(folder, "a.jsonl", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b",".join(b"c%d" % i for i in range(30_000)) + b"\n", f"more than {MAX_COLUMNS} columns"),
        (b",".join(b"c%d" % i for i in range(4000)) + b"\n" + b"a\n" * 70_000, f"more than {MAX_CELLS} cells"),
        (CSV + b"\xff,no,train\n", "can't decode byte 0xff"),
        (CSV + b"\0,no,train\n", "binary data"),
    ],
)
def test_csv_that_would_grow_is_refused(folder, content, message):
    with pytest.raises(FedloomError, match=message):
        raise read(folder, "a.csv", content)


def grown() -> list[bytes]:
    """Return small files that expand to far more than is allowed, each by another feature of the format."""
    words = repeated("x" * 10_000, 500_000).cast(pa.dictionary(pa.int32(), pa.binary()))
    many = pa.ListArray.from_arrays(pa.array([0, 2**26], pa.int32()), pa.nulls(2**26, pa.int8()))
    return [
        parquet_bytes(pa.table({"text": repeated("x" * 2**20, 200_000)})),
        parquet_bytes(pa.table({"text": words})),
        parquet_bytes(pa.table({"text": [b"y" * 300_000_000]}), use_dictionary=False, compression="zstd"),
        parquet_bytes(pa.table({"text": pa.nulls(2**25, pa.string())})),
        parquet_bytes(pa.table({"text": many})),
        parquet_bytes(pa.table({f"c{number}": [1] for number in range(MAX_COLUMNS + 1)})),
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_parquet_is_bounded(tmp_path):
    """Small files that grow are refused before memory does, and one just below the bound is read within another.

    The kernel counts: this process, and the processes that look.
    """
    bombs, small, large = grown(), tmp_path / "small.parquet", tmp_path / "large.parquet"
    assert max(map(len, bombs)) < 2**20
    for number, bomb in enumerate(bombs):
        (tmp_path / f"{number}.parquet").write_bytes(bomb)
    small.write_bytes(PARQUET)
    large.write_bytes(parquet_bytes(pa.table({"text": repeated("z" * 1000, 260_000)})))
    warm = f"""
import resource
from fedloom.platform.errors import DataError
{LOADING}
load_rows(DataSection(source={str(small)!r}))"""
    script = f"""
for number in range({len(bombs)}):
    try:
        load_rows(DataSection(source=f"{tmp_path}/{{number}}.parquet"))
    except DataError as error:
        assert "bytes" in str(error) or "columns" in str(error), error
    else:
        raise SystemExit(f"file {{number}} was read")
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < before + 2**28 + 2**27
assert {HIGH_WATER} < before + 2**24
assert len(load_rows(DataSection(source={str(large)!r})).table) == 260_000
"""

    assert peak_resident_bytes(warm, script) < 2**30 + 96 * large.stat().st_size


@tries(4)
@given(start=st.integers(0, len(PARQUET)), size=st.integers(0, 9), junk=st.binary(max_size=12))
def test_a_parquet_file_with_bytes_replaced(folder, start, size, junk):
    read(folder, "a.parquet", PARQUET[:start] + junk + PARQUET[start + size :])


def archives() -> dict[str, bytes]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.jsonl", JSONL)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        info = tarfile.TarInfo("{a.jsonl")
        info.size = len(JSONL)
        archive.addfile(info, io.BytesIO(JSONL))
    packed = {"gz": gzip.compress(JSONL), "bz2": bz2.compress(JSONL), "xz": lzma.compress(JSONL)}
    return {**packed, "zip": zipped.getvalue(), "tar": tarred.getvalue(), "tail": CSV + zipped.getvalue()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("kind", sorted(archives()))
def test_an_archive_under_another_name_is_not_unpacked(folder, name, kind):
    assert isinstance(read(folder, name, archives()[kind]), FedloomError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_is_no_file_is_refused_unopened(tmp_path, name):
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path))):
        place = tmp_path / f"{number}{name}"
        make(place)
        assert "not a file" in str(prepared(place))


@pytest.mark.parametrize("source", ["a\0b.jsonl", "a" * 5000 + ".jsonl", "~nosuchuser/x.csv", "", "\x07", "x" * 5000])
def test_no_name_of_a_file_gives_a_traceback(source):
    assert isinstance(prepared(source), FedloomError)


def test_batches_of_the_tokenizer_are_bounded_and_complete():
    """Long texts go through it in smaller batches, in their order."""
    texts = ["x" * (tokens.BATCH_CHARACTERS // 2)] * 5 + ["y"] * (tokens.BATCH + 1)
    batches = list(tokens._batches(texts))

    assert [text for batch in batches for text in batch] == texts
    assert max(sum(map(len, batch)) for batch in batches) <= tokens.BATCH_CHARACTERS
    assert max(map(len, batches)) <= tokens.BATCH


def test_memory_of_the_look_before_is_bounded(tmp_path):
    """Below the 64 MiB that the docstring states, whatever the size of the file: one line, or only brackets."""
    for unit in (b'"a":1,', b"[]{}", b'\\"', b"x", b'""'):
        path = tmp_path / "a.json"
        path.write_bytes(b"{" + unit * (4 * CHUNK_BYTES // len(unit)))
        assert peak_bytes(lambda path=path: check_text(path, "json")) < 2**26


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["long", "short", "wide"])
def test_memory_of_reading_is_bounded(tmp_path, kind):
    """Libraries' own memory counts: Arrow, pandas and what they leave behind."""
    path = tmp_path / ("a.csv" if kind == "short" else "a.jsonl")
    wide = b"{%s}\n" % b",".join(b'"k%d":1' % i for i in range(1000))
    content = {"long": JSONL * 20_000, "short": b"a,b\n" + b"x,y\n" * 2_000_000, "wide": wide + b"{}\n" * 5_000}[kind]
    cells = {"long": 600_000, "short": 4_000_000, "wide": 5_001_000}[kind]
    path.write_bytes(content)
    small = tmp_path / ("b" + path.suffix)
    small.write_bytes(FILES[f"a{path.suffix}"])
    load = "load_rows(DataSection(source={!r}))"
    warm = f"{LOADING}\n{load.format(str(small))}"

    assert peak_resident_bytes(warm, load.format(str(path))) < 2**28 + 16 * cells + 16 * len(content)


def test_the_error_of_a_label_names_few_of_many(folder):
    """A list of all the labels would be half a megabyte."""
    rows = b"".join(
        b'{"text":"t%d","label":"%s%d","split":"%s"}\n' % (i, b"L" * 100, i, b"test" if i > 4000 else b"train")
        for i in range(5000)
    )

    assert len(str(read(folder, "a.jsonl", rows))) < 3000


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
