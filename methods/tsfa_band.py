"""The inner problem of TSFA: the shares of a band and the ratios for a given latency theta, for many theta at once.

RECONSTRUCTED with the rest of TSFA (see :mod:`fedloom.methods.tsfa`). With the rates R_k and worths c_k of K clients::

    max over rho, b    sum_k c_k rho_k
    such that          start_k + (fixed_k + rho_k factor_k) / R_k(b_k) <= theta
                       lowest_k <= rho_k <= highest_k          sum_k b_k <= B

is concave in b. At the optimum all that could still use more of the band has the same worth per Hz,

    c_k (theta - start_k) / factor_k  R_k'(b_k) = nu     or b_k is at the end that lowest_k or highest_k sets

and nu is found from sum_k b_k = B. Every step works on all theta and all clients as one array.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedloom.platform.world.rates import LN2, bandwidth_for, efficiency_at_slope, rate_bit_per_s, rate_slope

UNUSED = 1e-10  # at most twice this share of the band is left over by a root that is never above the band
STEPS = 100  # of a root: Newton takes about ten, halving the bracket alone about forty
LEAST_WORTH = 1e-12  # relative to the largest: what a client of worth 0 counts, so that free band still goes to it

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What K clients have to send; all of shape (K,).

    Attributes:
        start_s: when each begins to upload, with whatever delay is added to the upload.
        fixed_bits: of its upload that do not depend on the ratio; >= 0.
        factor_bits: of its upload at ratio 1; > 0.
        lowest: the smallest ratio; > 0.
        highest: the largest ratio; >= ``lowest``.
        worth: the cost of leaving everything out; >= 0.
    """

    start_s: Vector
    fixed_bits: Vector
    factor_bits: Vector
    lowest: Vector
    highest: Vector
    worth: Vector

    def of(self, chosen: Mask) -> "Load":
        """Return what the chosen clients have to send."""
        return Load(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})

    def bits(self, ratios: Vector) -> Vector:
        """Return the bits of an upload at these ratios."""
        return self.fixed_bits + ratios * self.factor_bits

    @property
    def weights(self) -> Vector:
        """The worths, none of them zero."""
        return np.maximum(self.worth, LEAST_WORTH * (self.worth.max() or 1.0))


def finish_times(bits: Vector, start_s: Vector, *, snr_hz: Vector, bandwidth_hz: float) -> Vector:
    """Return the earliest times (S,) at which all K clients can have sent their bits (S, K), in each of S cases.

    They are infinite where a client has no channel. Everybody then finishes at the same moment.
    """
    if not (snr_hz > 0).all():
        return np.full(len(bits), np.inf)
    at_equal_shares = bits / rate_bit_per_s(bandwidth_hz / len(snr_hz), snr_hz)
    high = (start_s + at_equal_shares * (1 + 1e-6)).max(axis=1)  # so that rounding cannot move the root outside
    low = (start_s + bits * LN2 / snr_hz).max(axis=1)

    def excess(time_s: Vector) -> tuple[Vector, Vector]:
        slack = time_s[:, None] - start_s
        needed = bits / slack
        bandwidth = bandwidth_for(needed, snr_hz)
        total = bandwidth.sum(axis=1)
        fall = (needed / slack / rate_slope(bandwidth, snr_hz)).sum(axis=1)
        return np.log(total / bandwidth_hz), -fall / total

    with np.errstate(all="ignore"):
        return falling_root(excess, low, high)


def allocate(load: Load, thetas: Vector, *, snr_hz: Vector, bandwidth_hz: float) -> tuple[Vector, Vector]:
    """Return the best ratios and shares of the band, both (T, K), for each of T feasible values of theta."""
    slack = thetas[:, None] - load.start_s
    least = bandwidth_for(load.bits(load.lowest) / slack, snr_hz)
    wanted = bandwidth_for(load.bits(load.highest) / slack, snr_hz)
    shares = wanted.copy()
    scarce = np.flatnonzero(wanted.sum(axis=1) > bandwidth_hz)
    if len(scarce):
        gain = load.weights * slack[scarce] / load.factor_bits
        most = np.minimum(wanted[scarce], bandwidth_hz)
        shares[scarce] = _shared_out(gain, least[scarce], most, snr_hz=snr_hz, bandwidth_hz=bandwidth_hz)
    ratios = (slack * rate_bit_per_s(shares, snr_hz) - load.fixed_bits) / load.factor_bits
    ratios = np.where(shares >= wanted, load.highest, np.clip(ratios, load.lowest, load.highest))
    return ratios, shares


def _shared_out(gain: Vector, least: Vector, most: Vector, *, snr_hz: Vector, bandwidth_hz: float) -> Vector:
    """Return shares (T, K) between ``least`` and ``most`` at which gain R'(b) is alike, and whose sum is the band."""

    def at(price: Vector) -> tuple[Vector, Vector]:
        per_gain = price[:, None] / gain
        v = efficiency_at_slope(per_gain)
        bandwidth = snr_hz / np.expm1(v)
        fall = bandwidth * per_gain * LN2 / np.expm1(-v) ** 2
        inside = (bandwidth > least) & (bandwidth < most)
        return np.clip(bandwidth, least, most), np.where(inside, fall, 0.0)

    def excess(log_price: Vector) -> tuple[Vector, Vector]:
        bandwidth, fall = at(np.exp(log_price))
        total = bandwidth.sum(axis=1)
        return np.log(total / bandwidth_hz), -fall.sum(axis=1) / total

    with np.errstate(all="ignore"):
        low = np.log((gain * rate_slope(most, snr_hz)).min(axis=1))
        high = np.log((gain * rate_slope(least, snr_hz)).max(axis=1))
        return at(np.exp(falling_root(excess, low, high)))[0]


def falling_root(function: Callable[[Vector], tuple[Vector, Vector]], low: Vector, high: Vector) -> Vector:
    """Return points (S,) where a falling function is within [-2 UNUSED, 0], by Newton's steps kept in a bracket.

    Args:
        function: gives the values (S,) and the slopes (S,) at points (S,).
        low: (S,) where the function is above 0.
        high: (S,) where it is not; returned for a row that does not get there.
    """
    x, found = high, np.zeros(len(high), dtype=bool)
    for _ in range(STEPS):
        value, slope = function(x)
        value = value + UNUSED
        found |= np.abs(value) <= UNUSED
        if found.all():
            return x
        above = value > 0
        low, high = np.where(above & ~found, x, low), np.where(above | found, high, x)
        step = x - value / slope
        middle = (low + high) / 2
        x = np.where(found, x, np.where((step > low) & (step < high), step, middle))
    return np.where(found, x, high)
