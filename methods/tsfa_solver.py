"""The round's problem of TSFA: how much each of K clients sends, and which share of the band it gets.

RECONSTRUCTED with the rest of TSFA (see :mod:`fedloom.methods.tsfa`). With rates R_k, worths c_k and ratios rho_k::

    min over rho, b, theta    V sum_k c_k (1 - rho_k) + Z theta
    such that                 start_k + (fixed_k + rho_k factor_k) / R_k(b_k) <= theta
                              lowest_k <= rho_k <= highest_k          sum_k b_k <= B

For a given theta :mod:`fedloom.methods.tsfa_band` solves it. Over theta the cost may have several valleys, so a grid is
searched first, then a finer one between the neighbours of its best point, and so on. Links that do not share a band
need no search: there the cost is convex and piecewise linear in theta.
"""

from dataclasses import dataclass

import numpy as np

from fedloom.methods.tsfa_band import Load, Mask, Vector, allocate, finish_times
from fedloom.platform.world.rates import bandwidth_for

GRIDS = (64, 16, 16, 16, 16)  # points over [theta_min, theta_max], then between the neighbours of the best one
GIVEN_UP = 1e-3  # share of the band for clients that cannot be in time anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """V > 0, Z >= 0, and what theta may not pass."""

    tradeoff: float
    queue_s: float
    limit_s: float = np.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The ratios (K,), the shares of the band in Hz (K,) if there is one, theta, and whether the round was feasible.

    A round is infeasible if not even everybody's lowest ratio can be sent within the limit. As many clients as
    possible are then in time, and ratios and theta are the best for these; the others are given up and send their
    lowest ratio. If none can be in time, theta is when all have sent theirs.
    """

    ratios: Vector
    bandwidth_hz: Vector | None
    theta_s: float
    feasible: bool


def solve_band(load: Load, terms: Terms, *, snr_hz: Vector, bandwidth_hz: float) -> Solution:
    """Solve for clients that share a band.

    Args:
        load: what is to be sent.
        terms: of the trade.
        snr_hz: (K,) p h / N0.
        bandwidth_hz: B.
    """
    bits = np.stack([load.bits(load.lowest), load.bits(load.highest)])
    earliest, latest = finish_times(bits, load.start_s, snr_hz=snr_hz, bandwidth_hz=bandwidth_hz)
    if not (np.isfinite(earliest) and earliest <= terms.limit_s):
        return _in_part(load, terms, earliest, snr_hz=snr_hz, bandwidth_hz=bandwidth_hz)
    low, high = earliest, min(latest, terms.limit_s)
    for points in GRIDS:
        thetas = np.geomspace(low, high, points)
        ratios, shares = allocate(load, thetas, snr_hz=snr_hz, bandwidth_hz=bandwidth_hz)
        best = int(np.argmin(terms.tradeoff * ((1 - ratios) @ load.weights) + terms.queue_s * thetas))
        low, high = thetas[max(best - 1, 0)], thetas[min(best + 1, points - 1)]
    return Solution(ratios=ratios[best], bandwidth_hz=shares[best], theta_s=float(thetas[best]), feasible=True)


def solve_links(load: Load, terms: Terms, *, rate_bit_per_s: Vector) -> Solution:
    """Solve for clients whose rates (K,) are given, infinite ones included.

    As theta grows, client k gains c_k R_k / factor_k per second until it sends all it may. The best theta is the first
    at which the clients that have not got there gain no more than Z / V.
    """
    with np.errstate(divide="ignore"):  # a link that carries nothing
        begins = load.start_s + load.bits(load.lowest) / rate_bit_per_s
        ends = load.start_s + load.bits(load.highest) / rate_bit_per_s
    in_time = np.isfinite(begins) & (begins <= terms.limit_s)
    if not in_time.any():
        return Solution(ratios=load.lowest, bandwidth_hz=None, theta_s=float(begins.max()), feasible=False)
    if not in_time.all():
        part = solve_links(load.of(in_time), terms, rate_bit_per_s=rate_bit_per_s[in_time])
        return _given_up(load, in_time, part, None)

    earliest = float(begins.max())
    order = np.argsort(ends)
    gains = (load.weights * rate_bit_per_s / load.factor_bits)[order]
    candidates = np.append(earliest, ends[order])
    still_gained = np.append(np.cumsum(gains[::-1])[::-1], 0.0)  # per second, past each candidate
    theta = candidates[np.argmax(terms.tradeoff * still_gained <= terms.queue_s)]
    theta = float(np.clip(theta, earliest, min(candidates.max(), terms.limit_s)))
    with np.errstate(invalid="ignore"):  # an infinite rate times no time: such a client is at its end
        ratios = ((theta - load.start_s) * rate_bit_per_s - load.fixed_bits) / load.factor_bits
    ratios = np.where(ends <= theta, load.highest, np.clip(ratios, load.lowest, load.highest))
    return Solution(ratios=ratios, bandwidth_hz=None, theta_s=theta, feasible=True)


def _in_part(load: Load, terms: Terms, earliest_s: float, *, snr_hz: Vector, bandwidth_hz: float) -> Solution:
    """Solve for those who can be in time; if none can, let all finish at once, as early as possible."""
    left_hz = (1 - GIVEN_UP) * bandwidth_hz
    in_time = _in_time(load, snr_hz=snr_hz, bandwidth_hz=left_hz, limit_s=terms.limit_s)
    shares = np.full(len(snr_hz), bandwidth_hz / len(snr_hz))
    if in_time.any():
        part = solve_band(load.of(in_time), terms, snr_hz=snr_hz[in_time], bandwidth_hz=left_hz)
        shares[~in_time] *= GIVEN_UP
        shares[in_time] = part.bandwidth_hz
        return _given_up(load, in_time, part, shares)
    if np.isfinite(earliest_s):
        shares = bandwidth_for(load.bits(load.lowest) / (earliest_s - load.start_s), snr_hz)
    return Solution(ratios=load.lowest, bandwidth_hz=shares, theta_s=float(earliest_s), feasible=False)


def _in_time(load: Load, *, snr_hz: Vector, bandwidth_hz: float, limit_s: float) -> Mask:
    """Return the largest set of clients that can have sent their lowest ratios within the limit: the least needy."""
    slack = limit_s - load.start_s
    reachable = (slack > 0) & (snr_hz > 0)
    needs = np.full(len(snr_hz), np.inf)
    needs[reachable] = bandwidth_for(load.bits(load.lowest)[reachable] / slack[reachable], snr_hz[reachable])
    order = np.argsort(needs, kind="stable")
    chosen = np.zeros(len(snr_hz), dtype=bool)
    chosen[order] = np.cumsum(needs[order]) <= bandwidth_hz
    return chosen


def _given_up(load: Load, in_time: Mask, part: Solution, shares: Vector | None) -> Solution:
    """Return the solution for those in time, with the lowest ratios for the others."""
    ratios = load.lowest.copy()
    ratios[in_time] = part.ratios
    return Solution(ratios=ratios, bandwidth_hz=shares, theta_s=part.theta_s, feasible=False)
