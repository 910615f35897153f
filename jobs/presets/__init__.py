"""The experiments that come with Fedloom: one YAML file each, whose first line says what it is."""

from pathlib import Path

from fedloom.platform.errors import ExperimentError, nearest

FOLDER = Path(__file__).parent


def preset_titles() -> dict[str, str]:
    """Return the presets by name, with the comment that opens each file."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in _files()}


def experiment_path(given: str) -> Path:
    """Return the file that a user means: a path, or the name of a preset.

    Raises:
        ExperimentError: there is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    names = {file.stem: file for file in _files()}
    if given in names:
        return names[given]
    raise ExperimentError(
        f"{given}: there is no such file and no such preset.{nearest(given, names)} Presets: {', '.join(names)}."
    )


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))
