"""A look at a file of data before the libraries that parse it: some content makes them crash or grow.

pyarrow recurses into nested objects until the process dies, dies of the document ``null`` and leaves bytes that are no
UTF-8 in its tables; `datasets` unpacks whatever looks like an archive, under any name. A few bytes of Parquet stand for
any number of rows.
"""

import codecs
import re
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedloom.platform.reading import check_regular

LARGEST_FILE_BYTES = 2**36
PARQUET_BYTES = 2**28  # what a Parquet file of any size may take as a table,
PARQUET_FACTOR = 32  # and what each of its bytes may add
MAX_DEPTH = 64
MAX_COLUMNS = 4096
MAX_CELLS = 2**28
CHUNK_BYTES = 2**20
ESCAPED = re.compile(rb"\\.", re.DOTALL)
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
BINARY = bytes(range(9))  # control characters below the tabulator: every archive that is UTF-8 has one of them


def check_file(path: Path, loader: str) -> None:
    """Refuse what is no file, is empty or too large, and what the parser of its kind should not see.

    Args:
        path: where it lies.
        loader: ``json``, ``csv`` or ``parquet``.

    Raises:
        OSError: it cannot be read.
        ValueError: what is wrong with it.
    """
    if check_regular(path, LARGEST_FILE_BYTES) == 0:
        raise ValueError("it is empty")
    if loader == "parquet":
        check_parquet(path)
    else:
        check_text(path, loader)


def check_parquet(path: Path) -> None:
    """Decode a file in a process of its own, and refuse it if that takes too much; this process takes no memory.

    Allowed are ``PARQUET_BYTES`` and ``PARQUET_FACTOR`` times the file's size, both for its table, with 16 bytes more
    for each cell, and for the memory of the process that looks, which the kernel holds to it (on Linux).

    Raises:
        OSError: it cannot be read.
        ValueError: it is no Parquet file, has more than ``MAX_COLUMNS`` columns (those of nested ones counted apart),
            or takes more.
    """
    limit_bytes = PARQUET_BYTES + PARQUET_FACTOR * path.stat().st_size
    program = Path(__file__).with_name("parquet_look.py")
    # -P: its neighbours, e.g. tokens.py, are not modules for the libraries that it imports.
    command = [sys.executable, "-P", str(program), str(limit_bytes), str(MAX_COLUMNS), str(path.resolve())]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        reason = done.stdout.strip() or f"decoding it ends a process with the status {done.returncode}"
        raise ValueError(reason)


def check_text(path: Path, loader: str) -> None:
    """Read a file once, in chunks, and refuse what no parser should see; takes less than 64 MiB of memory.

    Args:
        path: a regular file.
        loader: ``json`` or ``csv``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, holds binary data, does not begin as JSON does, is nested deeper than ``MAX_DEPTH``,
            or has more than ``MAX_COLUMNS`` columns (in JSON: different keys) or ``MAX_CELLS`` cells, empty ones
            included.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    shape = _JsonShape() if loader == "json" else _CsvShape()
    with path.open("rb") as file:
        _check_start(file, loader)
        while chunk := file.read(CHUNK_BYTES):
            decoder.decode(chunk)
            if len(chunk.translate(None, BINARY)) < len(chunk):
                raise ValueError("it holds binary data (control characters), not text")
            shape.add(chunk)
            if shape.num_columns > MAX_COLUMNS:
                raise ValueError(f"it has more than {MAX_COLUMNS} columns")
            if shape.num_columns * shape.num_rows > MAX_CELLS:
                raise ValueError(f"it has more than {MAX_CELLS} cells: {shape.num_columns} columns in every row")
        decoder.decode(b"", final=True)


def _check_start(file: BinaryIO, loader: str) -> None:
    start = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if start.startswith(b"BZh"):
        raise ValueError("it holds binary data (bzip2), not text")
    if loader == "json" and start and not start.startswith((b"{", b"[")):
        raise ValueError("it is neither a list of objects nor one object a line")


class _CsvShape:
    """Columns of the first line, and at least as many rows as there are."""

    def __init__(self) -> None:
        self.num_columns = 0
        self.num_rows = 0

    def add(self, chunk: bytes) -> None:
        """Count one more chunk."""
        if not self.num_columns:
            line = re.split(rb"[\r\n]", chunk.lstrip(b"\r\n"), maxsplit=1)[0]
            self.num_columns = line.count(b",") + 1
        self.num_rows += chunk.count(b"\n") + chunk.count(b"\r")


class _JsonShape:
    """How deep brackets are nested outside of strings, how many objects there are, and how many different keys."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._keys: set[int] = set()  # hashes: a key may be long
        self._depth = 0
        self._inside = False  # a string
        self._rest = b""  # a backslash at the end of a chunk

    @property
    def num_columns(self) -> int:
        """The number of different keys, those of nested objects included; one that two chunks share may be missing."""
        return len(self._keys)

    def add(self, chunk: bytes) -> None:
        """Count one more chunk.

        Raises:
            ValueError: a bracket stands deeper than ``MAX_DEPTH``.
        """
        text = ESCAPED.sub(b"", self._rest + chunk)
        self._rest = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").split(b'"')
        outside = parts[int(self._inside) :: 2]
        strings = parts[1 + int(self._inside) :: 2]  # those that begin in this chunk
        followed = zip(strings, outside[1:], strict=False)
        self._keys.update(hash(word) for word, rest in followed if rest.lstrip()[:1] == b":")
        self._inside ^= len(parts) % 2 == 0
        self._nest(b"".join(outside))

    def _nest(self, outside: bytes) -> None:
        self.num_rows += outside.count(b"{")
        found = np.frombuffer(outside.translate(None, NO_BRACKETS), np.uint8)
        if len(found):
            depths = self._depth + np.cumsum(np.where((found == ord("[")) | (found == ord("{")), 1, -1))
            self._depth = int(depths[-1])
            if depths.max() > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels are nested")
