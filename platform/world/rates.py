"""Shannon's rate over a share of a band, its slope, and the inverses of both, over whole vectors.

With b the bandwidth in Hz and g = p h / N0 the received power over the noise's density, also in Hz:

    R(b)  = b log2(1 + g / b)                 increasing and concave in b; 0 at b = 0, below g / ln 2 everywhere
    R'(b) = log2(1 + g / b) - g / ((b + g) ln 2)

Both inverses are functions of v = ln(1 + g / b), the nats per second and Hz, alone:

    R(b)  = R    where  ln(expm1(v) / v) = ln(g / (R ln 2))
    R'(b) = s    where  v + expm1(-v)    = s ln 2                         and  b = g / expm1(v)

The left sides are convex and increasing, so that Newton's steps from the right never pass the root. The closed forms
with Lambert's W lose digits next to its branch point, where b is large against g; these steps do not. All functions
broadcast; rates are in bit/s.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

LN2 = float(np.log(2.0))
NEWTON_STEPS = 4  # to the last digit from the starting points below, over the whole range of doubles

Vector = NDArray[np.float64]


def rate_bit_per_s(bandwidth_hz: ArrayLike, snr_hz: ArrayLike) -> Vector:
    """Return R(b); 0 where the bandwidth is 0, and its limit g / ln 2 where it is infinite.

    Args:
        bandwidth_hz: b >= 0.
        snr_hz: g >= 0, p h / N0.
    """
    b, g = _floats(bandwidth_hz, snr_hz)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = b * np.log1p(g / b) / LN2
    return np.asarray(np.where(b > 0, np.where(np.isinf(b), g / LN2, rate), 0.0))


def rate_slope(bandwidth_hz: ArrayLike, snr_hz: ArrayLike) -> Vector:
    """Return R'(b) in bit/s per Hz; infinite at b = 0 (but for g = 0), 0 where the bandwidth is infinite."""
    b, g = _floats(bandwidth_hz, snr_hz)
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.log1p(g / b)
    v = np.where(g > 0, v, 0.0)
    return np.asarray((v + np.expm1(-v)) / LN2)


def bandwidth_for(rate: ArrayLike, snr_hz: ArrayLike) -> Vector:
    """Return the bandwidth in Hz at which R(b) is ``rate`` (in bit/s, >= 0); infinite where no bandwidth gives it."""
    R, g = _floats(rate, snr_hz)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = R * LN2 / g  # of the limit
        reachable = (share > 0) & (share < 1)
        target = np.where(reachable, -np.log(share), 1.0)
        v = target + np.log1p(target)
        for _ in range(NEWTON_STEPS):
            filled = -np.expm1(-v)
            # The slope 1/(1 - e^-v) - 1/v lies between 1/2 and 1; next to v = 0 only the bound keeps its digits.
            slope = np.maximum(1 / filled - 1 / v, 0.5)
            v = np.maximum(v - (v + np.log(filled / v) - target) / slope, target)
        b = g / np.expm1(v)
    return np.asarray(np.where(reachable, b, np.where(R > 0, np.inf, 0.0)))


def bandwidth_at_slope(slope: ArrayLike, snr_hz: ArrayLike) -> Vector:
    """Return the bandwidth in Hz at which R'(b) is ``slope`` (in bit/s per Hz, >= 0); infinite where it is 0."""
    s, g = _floats(slope, snr_hz)
    v = efficiency_at_slope(s)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.where(g > 0, g / np.expm1(v), 0.0))


def efficiency_at_slope(slope: ArrayLike) -> Vector:
    """Return v = ln(1 + g / b) at which R'(b) is ``slope``: it depends on nothing else."""
    m = np.asarray(slope, dtype=np.float64) * LN2
    v = m + np.sqrt(2 * m)
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(NEWTON_STEPS):
            falling = np.expm1(-v)
            v = v + (v + falling - m) / falling
    return np.asarray(np.where(m > 0, v, 0.0))


def _floats(*values: ArrayLike) -> tuple[Vector, Vector]:
    first, second = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in values))
    return first, second
