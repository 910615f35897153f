"""Files that are there as a whole or not at all, also after a crash: written beside their place, synced, renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fedloom.platform.errors import CheckpointError

PARTIAL = ".partial"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it: it is there as a whole, or as it was before.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    partial = path.with_name(path.name + PARTIAL)
    with explained(path):
        try:
            write_synced(partial, content)
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and have the disk take it."""
    path.unlink(missing_ok=True)  # of a process that was killed, or a link that leads elsewhere
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk take the names of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors in writing to a place into one that names it.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
