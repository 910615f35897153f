"""Controllers that plan no further than the round: budgets as they are, and the least cut that meets a deadline."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedloom.platform.client import Budget
from fedloom.platform.errors import ExperimentError
from fedloom.platform.world.controller import Conditions, Plan

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ROUNDING = 1e-9  # of a rank: how far below a whole number a ratio times r still counts as that number


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The profiles' own budgets in every round; the network's policy shares the band.

    Attributes:
        ratio: the ratio of every client, but for those that bear less (see :func:`largest_ratios`); ``None`` leaves
            the budgets as they are.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None

    reads_updates: ClassVar[bool] = False

    @property
    def steers(self) -> bool:
        """Only with a ratio of its own."""
        return self.ratio is not None

    def begin(self) -> dict[str, Any]:
        """Return nothing to remember."""
        return {}

    def plan(self, state: Mapping[str, Any], conditions: Conditions) -> Plan:
        """Return the budgets."""
        if self.ratio is None:
            return Plan(budgets=conditions.budgets)
        return Plan(budgets=with_ratios(conditions, np.minimum(self.ratio, largest_ratios(conditions))))

    def observe(self, state: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
        """Remember nothing."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyDeadline:
    """Equal shares of the band, and for every client the largest ratio with which it still meets the deadline.

    A baseline of ours. A client that cannot meet it sends one rank all the same.

    Attributes:
        deadline_s: the deadline of a round; ``None`` takes that of the cohort.
    """

    deadline_s: Seconds | None = None

    steers: ClassVar[bool] = True
    reads_updates: ClassVar[bool] = False

    def begin(self) -> dict[str, Any]:
        """Return nothing to remember."""
        return {}

    def plan(self, state: Mapping[str, Any], conditions: Conditions) -> Plan:
        """Cut the ratios.

        Raises:
            ExperimentError: there is no deadline.
        """
        deadline_s = self.deadline_s or conditions.deadline_s
        if deadline_s is None:
            raise ExperimentError(
                "key controller.deadline_s: the controller 'greedy_deadline' has no deadline to meet. "
                "Set controller.deadline_s or cohort.deadline_s."
            )
        channel = conditions.channel
        most = largest_ratios(conditions)
        slack_s = deadline_s - conditions.before_upload_s - channel.delay_up_s
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # an infinite rate and no time; a link that carries nothing
            ratios = (slack_s * channel.uplink_bit_per_s - conditions.fixed_bits) / conditions.factor_bits
            ranks = whole_ranks(np.where(np.isnan(ratios), most, np.minimum(ratios, most)), conditions.rank)
            bits = conditions.fixed_bits + ranks / conditions.rank * conditions.factor_bits
            finish_s = conditions.before_upload_s + (bits / channel.uplink_bit_per_s + channel.delay_up_s)
        ranks = np.maximum(1, ranks - (finish_s > deadline_s))  # whatever was rounded
        budgets = with_ratios(conditions, ranks / conditions.rank)
        shares = None
        if channel.bandwidth_hz is not None:
            shares = np.full(len(budgets), channel.bandwidth_hz / len(budgets))
        return Plan(budgets=budgets, bandwidth_hz=shares, facts={"mean_ratio": mean_ratio(budgets)})

    def observe(self, state: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
        """Remember nothing."""
        return {}


def largest_ratios(conditions: Conditions) -> NDArray[np.float64]:
    """Return the largest ratio (K,) that each client bears: whole ranks, at least one, over the global rank.

    It is the ratio of its own budget, else its rank over the global rank: a controller may lower what a machine is
    asked for, and never asks it for more.
    """
    own = np.array([budget.share(conditions.rank) for budget in conditions.budgets])
    return whole_ranks(own, conditions.rank) / conditions.rank


def whole_ranks(ratios: NDArray[np.float64], rank: int) -> NDArray[np.int64]:
    """Return the ranks (K,) that ratios come to: rounded down, so that no upload grows, and at least one."""
    return np.maximum(1, np.floor(ratios * rank + ROUNDING)).astype(np.int64)


def with_ratios(conditions: Conditions, ratios: NDArray[np.float64]) -> tuple[Budget, ...]:
    """Return the budgets with these ratios (K,), rounded down to whole ranks; the budgets' ranks are kept."""
    ranks = whole_ranks(ratios, conditions.rank).tolist()
    return tuple(
        replace(budget, ratio=kept / conditions.rank) for budget, kept in zip(conditions.budgets, ranks, strict=True)
    )


def mean_ratio(budgets: tuple[Budget, ...]) -> float:
    """Return the mean of the decided ratios."""
    return sum(budget.ratio or 0.0 for budget in budgets) / len(budgets)
