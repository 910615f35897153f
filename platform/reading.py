"""Reading files that others wrote: what is no file, or too large, is refused before a byte of it is read.

What lies in a folder that others can write to is reached through :func:`inside`, which follows no link out of it.
"""

import stat
from pathlib import Path


def check_regular(path: Path, limit_bytes: int) -> int:
    """Return the size of a file in bytes, after a look at it that opens nothing.

    Raises:
        OSError: it is not there, or may not be looked at.
        ValueError: it is no regular file (a pipe would block, a device may never end), is larger than ``limit_bytes``,
            or no file can have such a name.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is a folder, a pipe or a device, not a file")
    if found.st_size > limit_bytes:
        raise ValueError(f"it has {found.st_size} bytes; at most {limit_bytes} are read")
    return found.st_size


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return a regular file's content: never more than ``limit_bytes``, also of one that says it is empty (/proc).

    Raises:
        OSError: it cannot be read.
        ValueError: as :func:`check_regular`.
    """
    check_regular(path, limit_bytes)
    with path.open("rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"it has more than {limit_bytes} bytes")
    return content


def inside(folder: Path, name: str) -> Path:
    """Return the path of what has this name in a folder, which may itself be reached through links.

    Raises:
        ValueError: the name leads out of the folder, or it or a folder on its way is a symbolic link.
    """
    path = folder / name
    try:
        wanted = folder.resolve() / name
        plain = ".." not in Path(name).parts and not Path(name).is_absolute() and wanted.resolve() == wanted
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no name that a file can have
        plain = False
    if not plain:
        raise ValueError(f"{name!r} leads out of its folder, or is a symbolic link; put the file itself there")
    return path
