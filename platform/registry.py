"""Methods and controllers by name. The platform asks the catalogues and imports none of them itself."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter

from fedloom.platform.errors import ExperimentError, unknown
from fedloom.platform.method import Method

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue(Generic[Kind]):
    """Classes by name, listed in ``fedloom.methods`` as ``module:Class``.

    Attributes:
        what: the word for one of them, which is also the section of the experiment that names it.
        attribute: the list in ``fedloom.methods``.
    """

    what: str
    attribute: str

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        return sorted(self._listed())

    def named(self, name: str) -> type[Kind]:
        """Return the class registered under ``name``.

        Raises:
            ExperimentError: none has that name; the message gives the nearest one.
        """
        listed = self._listed()
        if name not in listed:
            raise ExperimentError(f"key {self.what}.name: {unknown(self.what, name, listed)}")
        module, _, attribute = listed[name].partition(":")
        return cast(type[Kind], getattr(importlib.import_module(module), attribute))

    def build(self, name: str, options: Mapping[str, Any]) -> Kind:
        """Build one from its name and validated options.

        Raises:
            ExperimentError: none has that name.
            pydantic.ValidationError: an option is unknown, missing or out of range.
        """
        kind: Any = self.named(name)
        return cast(Kind, options_adapter(kind).validate_python(dict(options)))

    def option_names(self, name: str) -> list[str]:
        """Return the names of its options."""
        return [field.name for field in dataclasses.fields(cast(Any, self.named(name)))]

    def _listed(self) -> dict[str, str]:
        return cast(dict[str, str], getattr(importlib.import_module("fedloom.methods"), self.attribute))


@functools.cache
def options_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return the validator of a class's options: its dataclass fields; unknown keys, NaN and infinities are refused."""
    kind.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(kind)


METHODS: Catalogue[Method] = Catalogue(what="method", attribute="CATALOGUE")
method_names = METHODS.names
method_class = METHODS.named
build_method = METHODS.build
option_names = METHODS.option_names
