"""From a YAML file and ``--set key=value`` overrides to a validated experiment, and back to YAML.

Every error names the file, the key, the value and what is allowed.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedloom.platform.bounded_yaml import MAX_DEPTH, MAX_TEXT_BYTES, parse_yaml
from fedloom.platform.errors import ExperimentError, clipped, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Method
from fedloom.platform.reading import read_bounded
from fedloom.platform.registry import METHODS, Catalogue, Kind
from fedloom.platform.world.controller import CONTROLLERS
from fedloom.platform.world.presets import expanded


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and validate an experiment.

    Whatever the file holds, memory stays below 256 MiB: see :func:`~fedloom.platform.bounded_yaml.parse_yaml`.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dotted keys, e.g. ``method.tau=0.9`` or ``population.profiles.0.rank=4``.

    Raises:
        ExperimentError: the file, a key or a value is wrong.
    """
    return validated(read_document(path), place=clipped(path.name), overrides=overrides)


def validated(document: Mapping[str, Any], *, place: str, overrides: Sequence[str] = ()) -> Experiment:
    """Validate a document, the method's own options included; ``place`` is named in errors.

    Args:
        document: nested mappings of JSON values; left as it is.
        place: where it comes from.
        overrides: as in :func:`load_experiment`.

    Raises:
        ExperimentError: a key or a value is wrong.
    """
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        _apply(changed, override)
    document = expanded(changed)
    try:
        experiment = Experiment.model_validate(document)
    except ValidationError as error:
        raise ExperimentError(explained(error, Experiment, place)) from error
    _built(METHODS, experiment.method.name, experiment.method.options, place)
    _built(CONTROLLERS, experiment.controller.name, experiment.controller.options, place)
    return experiment


def _built(catalogue: Catalogue[Kind], name: str, options: Mapping[str, Any], place: str) -> Kind:
    """Build something of a catalogue with its own options."""
    try:
        return catalogue.build(name, options)
    except ExperimentError as error:
        raise ExperimentError(f"{place}, {error}") from error
    except ValidationError as error:
        owner = (f"the {catalogue.what} {name!r}", catalogue.option_names(name))
        raise ExperimentError(explained(error, Experiment, place, (catalogue.what,), owner)) from error


def method_with(name: str, overrides: Sequence[str], *, place: str) -> Method:
    """Build a method from its name and ``option=value``, outside of an experiment.

    Raises:
        ExperimentError: the method or one of its options is wrong; ``place`` is named.
    """
    options: dict[str, Any] = {}
    for override in overrides:
        _apply(options, override)
    return _built(METHODS, name, options, place)


def with_method(experiment: Experiment, name: str, options: Mapping[str, Any], *, place: str) -> Experiment:
    """Return the same experiment under another method.

    Raises:
        ExperimentError: the method or one of its options is wrong.
    """
    document = experiment.model_dump(mode="json")
    return validated(document | {"method": {"name": name, **options}}, place=place)


def experiment_yaml(experiment: Experiment) -> str:
    """Return the resolved experiment, every default written out."""
    text: str = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def read_document(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys, within the bounds of :func:`~fedloom.platform.bounded_yaml.parse_yaml`.

    Raises:
        ExperimentError: it cannot be read, or is no mapping.
    """
    try:
        text = read_bounded(path, MAX_TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{clipped(path)}: cannot be read: {clipped(error)}") from error
    try:
        document = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ExperimentError(f"{clipped(path.name)}: not valid YAML: {_reason(error)}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ExperimentError(f"{clipped(path.name)}: it must be a mapping of keys, not a {type(document).__name__}")
    return {str(key): value for key, value in document.items()}


def _reason(error: yaml.YAMLError) -> str:
    return clipped(" ".join(str(error).split()), 400)


def _apply(document: dict[str, Any], override: str) -> None:
    """Set one dotted key; a number picks from a list."""
    key, separator, text = override.partition("=")
    said = f"--set {clipped(override)}"
    if not separator or not key:
        raise ExperimentError(f"{said}: write it as key=value, e.g. --set method.name=florist")
    if key.count(".") >= MAX_DEPTH:
        raise ExperimentError(f"{said}: the key has more than {MAX_DEPTH} parts")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ExperimentError(f"{said}: the value is not valid YAML: {_reason(error)}") from error
    for kind in ("method", "controller"):
        section = document.get(kind)
        if key == f"{kind}.name" and isinstance(section, dict) and section.get("name") != value:
            document[kind] = {}  # options belong to the method or controller that they stand beside
    *parents, last = key.split(".")
    place: Any = document
    for part in parents:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = _member(place, part, said)
    if isinstance(place, list):
        _member(place, last, said)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ExperimentError(f"{said}: {clipped('.'.join(parents))} is a {type(place).__name__} and has no keys")


def _member(place: Any, part: str, said: str) -> Any:
    if isinstance(place, dict):
        return place[part]
    if isinstance(place, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(place):
        return place[int(part)]
    size = f"a list of {len(place)}; count from 0" if isinstance(place, list) else f"a {type(place).__name__}"
    raise ExperimentError(f"{said}: {clipped(repr(part))} cannot be looked up in {size}")


MAX_MISTAKES = 50  # told at once
Owner = tuple[str, list[str]]  # in words, and the options that it knows


def explained(
    error: ValidationError, root: type[BaseModel], place: str, prefix: tuple[str, ...] = (), owner: Owner | None = None
) -> str:
    """Word every mistake that pydantic has found, a line each: the place, the key, the value and what is known.

    Args:
        error: pydantic's.
        root: the schema of the whole file.
        place: the file, in words.
        prefix: the section in which the mistakes are.
        owner: whose options they are, where the section names something of a catalogue.
    """
    details = error.errors(include_url=False)
    lines = [_line(detail, root, place, prefix, owner) for detail in details[:MAX_MISTAKES]]
    if len(details) > MAX_MISTAKES:
        lines.append(f"{place}: {len(details) - MAX_MISTAKES} more mistakes are not listed")
    return "\n".join(lines)


def _line(detail: ErrorDetails, root: type[BaseModel], place: str, prefix: tuple[str, ...], owner: Owner | None) -> str:
    location = (*prefix, *detail["loc"])
    key = clipped(".".join(str(part) for part in location))
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = owner[1] if owner else _fields_at(root, location[:-1])
        what = f"{owner[0]} has no such option" if owner else "unknown key"
        listed = f"Known: {', '.join(known)}." if known else "It has none."
        return f"{place}, key {key}: {what}.{nearest(str(location[-1]), known)} {listed}"
    message = detail["msg"].removeprefix("Value error, ")
    message = clipped(message[:1].lower() + message[1:], 400)
    if detail["type"] == "value_error":
        return f"{place}{f', key {key}' if key else ''}: {message}"
    return f"{place}, key {key}: {clipped(repr(detail['input']))} is not allowed: {message}"


def _fields_at(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys of the section at a location of the schema."""
    section = root
    for part in location:
        if str(part) not in section.model_fields:
            continue  # a place in a list, or pydantic's name for one of several types
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        inner = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
