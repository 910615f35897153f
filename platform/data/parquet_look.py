"""A process of its own that decodes Parquet files once, in memory that the kernel bounds, and says what is wrong.

    python parquet_look.py LIMIT_BYTES MAX_COLUMNS FILE

A Parquet file says how large it is and may lie: a page of a kilobyte can claim to hold two gigabytes, and do so. So
nothing of what it says is believed. This program imports nothing of ours, since it has to start fast.
"""

import sys
from pathlib import Path

ROWS_AT_ONCE = 1024
CELL_BYTES = 16  # what a cell takes as a Python object at least, however little it takes in the table


def main() -> None:
    """Write to stdout what is wrong with a file, if anything, and exit with 1 then."""
    import pyarrow
    import pyarrow.parquet

    limit_bytes, max_columns, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than they use
    pyarrow.set_cpu_count(1)
    _limit_memory(limit_bytes)
    try:
        _decode(path, limit_bytes, max_columns)
    except (MemoryError, pyarrow.ArrowMemoryError):
        sys.exit(_say(f"more than {limit_bytes} bytes of memory are needed to decode it"))
    except Exception as error:
        sys.exit(_say(f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _decode(path: str, limit_bytes: int, max_columns: int) -> None:
    """Decode a file batch by batch, keeping none.

    Raises:
        ValueError: it has more columns, or takes more memory as a table.
    """
    from pyarrow import parquet

    num_bytes = 0
    with parquet.ParquetFile(path) as file:
        num_columns = max(1, len(file.schema_arrow))  # rows without columns are rows too
        if file.metadata.num_columns > max_columns:
            raise ValueError(f"it has more than {max_columns} columns")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
            plain = (column.dictionary_decode() if hasattr(column, "indices") else column for column in batch.columns)
            num_bytes += sum(column.nbytes for column in plain) + CELL_BYTES * num_columns * batch.num_rows
            if num_bytes > limit_bytes:
                raise ValueError(f"its rows take more than {limit_bytes} bytes as a table")


def _limit_memory(more_bytes: int) -> None:
    """Let this process have so much more memory than now; only Linux can."""
    status = Path("/proc/self/status")
    if status.exists():
        import resource

        line = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
        limit = int(line.split()[1]) * 1024 + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _say(reason: str) -> int:
    sys.stdout.write(reason[:1000])
    return 1


if __name__ == "__main__":
    main()
