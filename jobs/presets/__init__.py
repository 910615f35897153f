"""The experiments that come with Fedloom: one YAML file each, whose first line says what it is.

Presets after a paper stand in ``papers/`` and bear the folder in their name, e.g. ``papers/florist-dolly``.
"""

from collections.abc import Mapping
from pathlib import Path

from fedloom.platform.errors import ExperimentError, nearest

FOLDER = Path(__file__).parent


def preset_titles() -> dict[str, str]:
    """Return the presets by name, with the comment that opens each file."""
    return {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in _files().items()}


def experiment_path(given: str) -> Path:
    """Return the file that a user means: a path, or the name of a preset.

    Raises:
        ExperimentError: there is neither.
    """
    return _path(given, _files(), "preset")


def sweep_path(given: str) -> Path:
    """Return the file of a sweep: a path, or the name of one that comes along.

    Raises:
        ExperimentError: there is neither.
    """
    return _path(given, _sweeps(), "sweep")


def sweep_names() -> list[str]:
    """Return the names of the sweeps that come along."""
    return list(_sweeps())


def reference_path(given: str) -> Path:
    """Return a file of published numbers: a path, or the name of a paper whose tables come along."""
    known = FOLDER / "papers" / "published" / f"{given}.yaml"
    return known if given.isidentifier() and known.is_file() else Path(given)


def _path(given: str, known: Mapping[str, Path], what: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    if given in known:
        return known[given]
    raise ExperimentError(
        f"{given}: there is no such file and no such {what}.{nearest(given, known)} "
        f"{what.capitalize()}s: {', '.join(known)}."
    )


def _sweeps() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("sweeps/*.yaml"))}


def _files() -> dict[str, Path]:
    """Return the file of each preset by name: those of this folder, then the papers'."""
    paths = [*sorted(FOLDER.glob("*.yaml")), *sorted(FOLDER.glob("papers/*.yaml"), key=lambda path: path.stem)]
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}
