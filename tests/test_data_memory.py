"""Memory that a data file may take, whatever is in it: of the look before, of reading, and of what unpacks itself."""

from pathlib import Path

import pyarrow as pa
import pytest
from hostile import HIGH_WATER, peak_bytes, peak_resident_bytes
from hostile_data import FILES, JSONL, LOADING, PARQUET, parquet_bytes, repeated

from fedloom.platform.data import tokens
from fedloom.platform.data.guard import CHUNK_BYTES, MAX_COLUMNS, check_text


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
