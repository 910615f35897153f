"""The interface of a controller, which decides the budgets of a round, and controllers by name.

A controller is pure like a method: frozen options, and a state of JSON values that goes through it::

    plan   = PLAN(state, conditions)        before the round: ratios, and shares of the band
    state' = OBSERVE(state, latency_s)      after it

The platform asks the catalogue of :mod:`fedloom.methods` and imports no controller itself.
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from fedloom.platform.errors import ExperimentError, unknown
from fedloom.platform.method import Budget
from fedloom.platform.world.network import Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a controller may know before a round, in cohort order (K clients).

    Attributes:
        round: its number, from 1.
        channel: the network of this round.
        rank: the global rank r.
        budgets: the profiles' own.
        before_upload_s: (K,) download and training on the simulated clock.
        fixed_bits: (K,) of the upload that do not depend on the ratio: the head and the masks.
        factor_bits: (K,) of the upload at ratio 1; at ratio rho it has ``fixed_bits + rho * factor_bits``.
        weights: (K,) shares of the examples; their sum is 1.
        importance: (K,) energy of each client's last update, of mean 1; 1 for a client that has sent none.
        deadline_s: after which updates are left out; ``None`` if they never are.
    """

    round: int
    channel: Channel
    rank: int
    budgets: tuple[Budget, ...]
    before_upload_s: NDArray[np.float64]
    fixed_bits: NDArray[np.float64]
    factor_bits: NDArray[np.float64]
    weights: NDArray[np.float64]
    importance: NDArray[np.float64]
    deadline_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a controller has decided, in cohort order (K clients).

    Attributes:
        budgets: the profiles' own, with ratios as decided; ranks are kept.
        bandwidth_hz: (K,) shares of the band, in sum at most the band; ``None`` leaves them to the network's policy.
        facts: numbers to be logged for this round, by name.
    """

    budgets: tuple[Budget, ...]
    bandwidth_hz: NDArray[np.float64] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


class Controller(Protocol):
    """Decides the budgets of every round: frozen options and three pure functions."""

    @property
    def steers(self) -> bool:
        """Whether it decides ratios, so that the method must have one."""

    def begin(self) -> dict[str, Any]:
        """Return the state before the first round: JSON values only."""

    def plan(self, state: Mapping[str, Any], conditions: Conditions) -> Plan:
        """Decide a round."""

    def observe(self, state: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
        """Return the state after a round that took ``latency_s``."""


def controller_names() -> list[str]:
    """Return the names of all registered controllers, sorted."""
    return sorted(_catalogue())


def controller_class(name: str) -> type[Controller]:
    """Return the class registered under ``name``.

    Raises:
        ExperimentError: no controller has that name; the message gives the nearest one.
    """
    catalogue = _catalogue()
    if name not in catalogue:
        raise ExperimentError(f"key controller.name: {unknown('controller', name, catalogue)}")
    module, _, attribute = catalogue[name].partition(":")
    return cast(type[Controller], getattr(importlib.import_module(module), attribute))


def build_controller(name: str, options: Mapping[str, Any]) -> Controller:
    """Build a controller from its name and validated options.

    Raises:
        ExperimentError: no controller has that name.
        pydantic.ValidationError: an option is unknown, missing or out of range.
    """
    kind = controller_class(name)
    return cast(Controller, controller_options_adapter(kind).validate_python(dict(options)))


@functools.cache
def controller_options_adapter(kind: type[Controller]) -> TypeAdapter[Any]:
    """Return the validator of a controller's options: its dataclass fields, unknown keys refused."""
    kind.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def controller_option_names(name: str) -> list[str]:
    """Return the names of a controller's options."""
    return [entry.name for entry in dataclasses.fields(cast(Any, controller_class(name)))]


def _catalogue() -> dict[str, str]:
    return cast(dict[str, str], importlib.import_module("fedloom.methods").CONTROLLERS)
