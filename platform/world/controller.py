"""The interface of a controller, which decides the budgets of a round, and controllers by name.

A controller is pure like a method: frozen options, and a state of JSON values that goes through it::

    plan   = PLAN(state, conditions)        before the round: ratios, and shares of the band
    state' = OBSERVE(state, latency_s)      after it

The platform asks the catalogue of :mod:`fedloom.methods` and imports no controller itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.platform.client import Budget
from fedloom.platform.registry import Catalogue
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

    @property
    def reads_updates(self) -> bool:
        """Whether what it decides depends on what clients have sent, which noise in the aggregate does not cover."""

    def begin(self) -> dict[str, Any]:
        """Return the state before the first round: JSON values only."""

    def plan(self, state: Mapping[str, Any], conditions: Conditions) -> Plan:
        """Decide a round."""

    def observe(self, state: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
        """Return the state after a round that took ``latency_s``."""


CONTROLLERS: Catalogue[Controller] = Catalogue(what="controller", attribute="CONTROLLERS")
controller_names = CONTROLLERS.names
controller_class = CONTROLLERS.named
build_controller = CONTROLLERS.build
controller_option_names = CONTROLLERS.option_names
