"""From a YAML file and ``--set key=value`` overrides to a validated experiment, and back to YAML.

Every error names the file, the key, the value and what is allowed.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedloom.platform.errors import ExperimentError, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.registry import build_method, option_names
from fedloom.platform.world.controller import build_controller, controller_option_names
from fedloom.platform.world.presets import expanded

MAX_BYTES = 2**20  # beyond it a file is no experiment, and is not read


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and validate an experiment.

    Args:
        path: the YAML file, at most :data:`MAX_BYTES` long; what it holds takes some tens of times as much memory.
        overrides: ``key=value`` with dotted keys, e.g. ``method.tau=0.9`` or ``population.profiles.0.rank=4``.

    Raises:
        ExperimentError: the file, a key or a value is wrong.
    """
    return validated(_read(path), place=path.name, overrides=overrides)


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
        raise ExperimentError(_explained(error, place, ())) from error
    _check_named(experiment.method, "method", build_method, option_names, place)
    _check_named(experiment.controller, "controller", build_controller, controller_option_names, place)
    return experiment


def _check_named(
    section: Any,
    kind: str,
    build: Callable[[str, Mapping[str, Any]], object],
    options: Callable[[str], list[str]],
    place: str,
) -> None:
    """Build what a section names with its own options, to see that it can be built."""
    try:
        build(section.name, section.options)
    except ExperimentError as error:
        raise ExperimentError(f"{place}, {error}") from error
    except ValidationError as error:
        owner = (f"the {kind} {section.name!r}", options(section.name))
        raise ExperimentError(_explained(error, place, (kind,), owner)) from error


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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; an experiment must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        doubled = [key for key in keys if keys.count(key) > 1]
        if doubled:
            raise yaml.constructor.ConstructorError(None, None, f"the key {doubled[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ExperimentError(f"{path}: is no file; an experiment is a YAML file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ExperimentError(f"{path}: is larger than an experiment can be, which is {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: cannot be read as an experiment: {error}") from error
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ExperimentError(f"{path.name}: not valid YAML: {reason}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ExperimentError(f"{path.name}: an experiment is a mapping of keys, not a {type(document).__name__}")
    return {str(key): value for key, value in document.items()}


def _apply(document: dict[str, Any], override: str) -> None:
    """Set one dotted key; a number picks from a list."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ExperimentError(f"--set {override}: write it as key=value, e.g. --set method.name=florist")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExperimentError(f"--set {override}: the value is not valid YAML") from error
    for kind in ("method", "controller"):
        section = document.get(kind)
        if key == f"{kind}.name" and isinstance(section, dict) and section.get("name") != value:
            document[kind] = {}  # options belong to the method or controller that they stand beside
    *parents, last = key.split(".")
    place: Any = document
    for part in parents:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = _member(place, part, override)
    if isinstance(place, list):
        _member(place, last, override)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ExperimentError(f"--set {override}: {'.'.join(parents)} is a {type(place).__name__} and has no keys")


def _member(place: Any, part: str, override: str) -> Any:
    if isinstance(place, dict):
        return place[part]
    if isinstance(place, list) and part in {str(index) for index in range(len(place))}:
        return place[int(part)]
    size = f"a list of {len(place)}; count from 0" if isinstance(place, list) else f"a {type(place).__name__}"
    raise ExperimentError(f"--set {override}: {part!r} cannot be looked up in {size}")


Owner = tuple[str, list[str]]  # in words, and the options that it knows


def _explained(error: ValidationError, place: str, prefix: tuple[str, ...], owner: Owner | None = None) -> str:
    lines = [_line(detail, place, prefix, owner) for detail in error.errors(include_url=False)]
    return "\n".join(lines)


def _line(detail: ErrorDetails, place: str, prefix: tuple[str, ...], owner: Owner | None) -> str:
    location = (*prefix, *detail["loc"])
    key = ".".join(str(part) for part in location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = owner[1] if owner else _fields_at(location[:-1])
        what = f"{owner[0]} has no such option" if owner else "unknown key"
        listed = f"Known: {', '.join(known)}." if known else "It has none."
        return f"{place}, key {key}: {what}.{nearest(str(location[-1]), known)} {listed}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "value_error":
        return f"{place}{f', key {key}' if key else ''}: {message}"
    return f"{place}, key {key}: {detail['input']!r} is not allowed: {message}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Return the keys of the section at a location of the schema."""
    section: type[BaseModel] = Experiment
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
