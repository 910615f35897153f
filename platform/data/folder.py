"""A look at a folder that is laid out as a hub dataset: whoever made it must not choose what else is read."""

from pathlib import Path
from typing import Any

import yaml

from fedloom.platform.bounded_yaml import parse_yaml
from fedloom.platform.data.guard import check_file
from fedloom.platform.errors import DataError, clipped
from fedloom.platform.reading import read_bounded

CARD_BYTES = 2**20


def check_folder(path: Path) -> None:
    """Look at a folder before `datasets` does.

    Raises:
        DataError: a link leads out of it, or its card (the head of ``README.md``) names files elsewhere: by an address,
            an absolute path or ``..``.
    """
    top = path.resolve()
    outside = next((entry for entry in path.rglob("*") if not entry.resolve().is_relative_to(top)), None)
    if outside is not None:
        raise DataError(
            f"key data.source: {clipped(outside)} is a symbolic link that leads out of the folder; put the file there."
        )
    for name in ("README.md", ".huggingface.yaml"):
        place = path / name
        if not place.exists():
            continue
        try:
            strange = next((word for word in _words(_configs(place)) if _leads_out(word)), None)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"key data.source: {clipped(place)} cannot be read: {clipped(error)}") from error
        if strange is not None:
            raise DataError(
                f"key data.source: {clipped(place)} names {clipped(repr(strange))}, which lies out of the folder; "
                "name files in it by paths relative to it."
            )


def check_resolved(path: Path, builder: Any) -> None:
    """Look at the files of a folder that `datasets` would read.

    Args:
        path: the folder.
        builder: its `datasets.DatasetBuilder`.

    Raises:
        DataError: they are of another kind than JSON, CSV and Parquet, lie elsewhere, or one of them is refused by
            :mod:`~fedloom.platform.data.guard`.
    """
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    kinds = {"json": Json, "csv": Csv, "parquet": Parquet}
    loader = next((name for name, kind in kinds.items() if isinstance(builder, kind)), None)
    if loader is None:
        raise DataError(
            f"key data.source: most files of {clipped(path)} are of another kind; known are {', '.join(kinds)}."
        )
    top = path.resolve()
    for name in [name for names in builder.config.data_files.values() for name in names]:
        place = Path(name)
        if not place.resolve().is_relative_to(top):
            raise DataError(f"key data.source: {clipped(name)} lies out of the folder {clipped(path)}.")
        try:
            check_file(place, loader)
        except (OSError, ValueError) as error:
            raise DataError(
                f"key data.source: {clipped(place)} cannot be read as {loader}: {clipped(error)}"
            ) from error


def _configs(place: Path) -> Any:
    """Return what a card says about its files."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = read_bounded(place, CARD_BYTES).decode("utf-8")
    if place.suffix == ".md":
        head = REGEX_YAML_BLOCK.search(text)
        text = head[2] if head else ""
    card = parse_yaml(text)
    return card.get("configs") if isinstance(card, dict) else None


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for inner in value.values() for word in _words(inner)]
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [value] if isinstance(value, str) else []


def _leads_out(word: str) -> bool:
    return "::" in word or "://" in word or word.startswith(("/", "~", "\\")) or ".." in Path(word).parts
