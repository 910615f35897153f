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

import pytest
from hostile import outcome, tries
from hostile_data import CSV, FILES, JSONL, PARQUET, ROWS, prepared, read
from hypothesis import given
from hypothesis import strategies as st

from fedloom.platform.data import guard
from fedloom.platform.data.guard import MAX_CELLS, MAX_COLUMNS, MAX_DEPTH
from fedloom.platform.data.source import load_rows
from fedloom.platform.errors import FedloomError
from fedloom.platform.experiment_data import DataSection

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


def test_the_error_of_a_label_names_few_of_many(folder):
    """A list of all the labels would be half a megabyte."""
    rows = b"".join(
        b'{"text":"t%d","label":"%s%d","split":"%s"}\n' % (i, b"L" * 100, i, b"test" if i > 4000 else b"train")
        for i in range(5000)
    )

    assert len(str(read(folder, "a.jsonl", rows))) < 3000
