"""The experiments that come with Fedloom: one YAML file each, whose first line says what it is.

Presets after a paper stand in ``papers/`` and bear the folder in their name, e.g. ``papers/florist-dolly``.
"""

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
    path = Path(given)
    if path.is_file():
        return path
    names = _files()
    if given in names:
        return names[given]
    raise ExperimentError(
        f"{given}: there is no such file and no such preset.{nearest(given, names)} Presets: {', '.join(names)}."
    )


def _files() -> dict[str, Path]:
    """Return the file of each preset by name: those of this folder, then the papers'."""
    paths = [*sorted(FOLDER.glob("*.yaml")), *sorted(FOLDER.glob("papers/*.yaml"), key=lambda path: path.stem)]
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}
