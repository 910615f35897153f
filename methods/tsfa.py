"""TSFA, online stage: ratios and shares of the band in every round, under a limit on the mean latency.

Kim and Choi, Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates, arXiv:2505.00333.
RECONSTRUCTED: only the abstracts were at hand. They say that the first, offline stage chooses the rank, and that the
second adjusts the sparsification ratio and the bandwidth in every round by Lyapunov optimisation under a long-term
latency constraint. The formulas and defaults below are ours, consistent with that. The offline stage is not here.

A virtual queue Z counts the seconds by which past rounds were too long. In round t, with the rates R_k of this round,

    min over rho, b, theta    V sum_k w_k c_k (1 - rho_k) + Z^t theta                        drift plus penalty
    such that                 start_k + (fixed_k + rho_k factor_k) / R_k(b_k) <= theta
                              1/r <= rho_k <= what client k bears          sum_k b_k <= B
    Z^(t+1) = max(Z^t + T^t - T_bar, 0)                                                      T^t: what it took

Summing the last line gives (1/T) sum_t T^t <= T_bar + Z^T / T, whatever was planned. Ratios are then rounded down to
whole ranks, so that theta holds. Where updates are cut at a deadline, theta is not planned past it. Any method whose
clients train or send a share of the ranks can be steered: SOFT by its sparsity, FSLoRA by its sketching ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedloom.methods.controllers import ROUNDING, Seconds, largest_ratios, mean_ratio, with_ratios
from fedloom.methods.tsfa_band import Load
from fedloom.methods.tsfa_solver import Solution, Terms, solve_band, solve_links
from fedloom.platform.world.controller import Conditions, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TSFA:
    """Ratios and shares of the band by drift plus penalty.

    Attributes:
        latency_limit_s: T_bar, which the mean latency of the rounds shall not pass in the long run.
        tradeoff: V, in s^2, the price of what is left out against the price of lateness: a larger one sends more and
            keeps to the limit later.
        min_ratio: every client sends at least this share of the ranks, rounded up to whole ranks, or as much as it
            bears; ``None``: one rank.
        importance: c_k, what a share of client k's update is worth beside its share w_k of the examples. ``energy``:
            the energy of its last update over the cohort's mean, 1 before its first. ``uniform``: 1.
    """

    latency_limit_s: Seconds
    tradeoff: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    min_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    importance: Literal["uniform", "energy"] = "energy"

    steers: ClassVar[bool] = True

    @property
    def reads_updates(self) -> bool:
        """Only where their energy counts."""
        return self.importance == "energy"

    def begin(self) -> dict[str, Any]:
        """Return an empty queue."""
        return {"queue_s": 0.0}

    def plan(self, state: Mapping[str, Any], conditions: Conditions) -> Plan:
        """Solve the round's problem.

        Where not even everybody's lowest ratio can reach the server by the deadline, the fact ``infeasible`` is 1. The
        problem is then solved for as many clients as can be in time; the others send their lowest ratio. If none can be
        in time, all send it over the band that lets them finish at once, as early as possible.
        """
        queue_s = float(state["queue_s"])
        solution = self._solution(conditions, queue_s)
        budgets = with_ratios(conditions, solution.ratios)
        facts = {
            "queue_s": queue_s,
            "theta_s": solution.theta_s,
            "mean_ratio": mean_ratio(budgets),
            "infeasible": float(not solution.feasible),
        }
        return Plan(budgets=budgets, bandwidth_hz=solution.bandwidth_hz, facts=facts)

    def observe(self, state: Mapping[str, Any], latency_s: float) -> dict[str, Any]:
        """Let the queue grow by what the round took over the limit, or shrink."""
        return {"queue_s": max(float(state["queue_s"]) + latency_s - self.latency_limit_s, 0.0)}

    def _solution(self, conditions: Conditions, queue_s: float) -> Solution:
        channel = conditions.channel
        highest = largest_ratios(conditions)
        ranks = max(1, int(np.ceil((self.min_ratio or 0.0) * conditions.rank - ROUNDING)))
        load = Load(
            start_s=conditions.before_upload_s + channel.delay_up_s,
            fixed_bits=conditions.fixed_bits,
            factor_bits=conditions.factor_bits,
            lowest=np.minimum(ranks / conditions.rank, highest),
            highest=highest,
            worth=conditions.weights * (conditions.importance if self.importance == "energy" else 1.0),
        )
        # Whole ranks may take ROUNDING more than theta, and an update that comes after the deadline is lost.
        limit_s = np.inf if conditions.deadline_s is None else conditions.deadline_s * (1 - 2 * ROUNDING)
        terms = Terms(tradeoff=self.tradeoff, queue_s=queue_s, limit_s=limit_s)
        if channel.snr_hz is None or channel.bandwidth_hz is None:
            return solve_links(load, terms, rate_bit_per_s=channel.uplink_bit_per_s)
        return solve_band(load, terms, snr_hz=channel.snr_hz, bandwidth_hz=channel.bandwidth_hz)
