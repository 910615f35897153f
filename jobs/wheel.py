"""The running Fedloom as a wheel, for a cluster that has another version of it, or none.

It is made from the files that are imported now, of a checkout or of an installation, so that no build tool is needed.
Two things differ from the wheel that is published. It asks for no other package: Ray installs it by ``pip install
--target``, which would fetch torch again for every job. And its version ends with a digest of its files: Ray takes
wheels of one name for the same and would run the code of an earlier job.
"""

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import fedloom

MADE = (1980, 1, 1, 0, 0, 0)  # the oldest time that an archive can name: equal files give an equal wheel


def write_wheel(folder: Path) -> Path:
    """Write the wheel into a folder and return its path, e.g. ``fedloom-0.1.0+1f0c9a3b5d7e-py3-none-any.whl``."""
    package = Path(fedloom.__file__).parent
    files = {f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes() for path in _files(package)}
    digest = hashlib.sha256(_record(files).encode()).hexdigest()[:12]
    version = f"{fedloom.__version__}+{digest}"
    about = f"fedloom-{version}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: fedloom\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: fedloom\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/RECORD"] = f"{_record(files)}{about}/RECORD,,\n".encode()
    wheel = folder / f"fedloom-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, MADE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
    return wheel


def _files(package: Path) -> Iterator[Path]:
    """Yield the files of the package in order; in a checkout its rooms are links."""
    for folder, inner, names in os.walk(package, followlinks=True):
        inner[:] = sorted(set(inner) - {"__pycache__"})
        yield from (Path(folder, name) for name in sorted(names))


def _record(files: Mapping[str, bytes]) -> str:
    """Return a wheel's list of files: name, SHA-256 and size."""
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(content).digest()) for name, content in files.items()}
    return "".join(f"{name},sha256={digests[name].decode().rstrip('=')},{len(files[name])}\n" for name in files)
