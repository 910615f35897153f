"""Methods by name. The platform asks the catalogue and imports no method itself."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter

from fedloom.platform.errors import ExperimentError, unknown
from fedloom.platform.method import Method


def method_names() -> list[str]:
    """Return the names of all registered methods, sorted."""
    return sorted(_catalogue())


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``.

    Raises:
        ExperimentError: no method has that name; the message gives the nearest one.
    """
    catalogue = _catalogue()
    if name not in catalogue:
        raise ExperimentError(f"key method.name: {unknown('method', name, catalogue)}")
    module, _, attribute = catalogue[name].partition(":")
    return cast(type[Method], getattr(importlib.import_module(module), attribute))


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method from its name and validated options.

    Raises:
        pydantic.ValidationError: an option is unknown or out of range.
    """
    kind = method_class(name)
    return cast(Method, options_adapter(kind).validate_python(dict(options)))


@functools.cache
def options_adapter(kind: type[Method]) -> TypeAdapter[Any]:
    """Return the validator of a method's options: its dataclass fields, unknown keys refused."""
    kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def option_names(name: str) -> list[str]:
    """Return the names of a method's options."""
    return [field.name for field in dataclasses.fields(cast(Any, method_class(name)))]


def _catalogue() -> dict[str, str]:
    return cast(dict[str, str], importlib.import_module("fedloom.methods").CATALOGUE)
