"""Shares of one uplink band: who gets how much of it, and how long an upload then takes.

With K clients, band B in Hz, s_k = ``channel.snr_hz``, S_k bits to send and R_k(b) = b log2(1 + s_k / b):

    equal         b_k = B / K
    proportional  b_k = B n_k / sum_j n_j,  n_k = S_k / log2(1 + s_k K / B): the band that S_k bits would need in a
                  second if every hertz carried what it does at an equal share
    min_max       the b that minimise the latest finish  max_k a_k + S_k / R_k(b_k),  a_k: time before the upload,
                  the upload's delay included. All finish at the same time, and the band is used up.

Under all of them, clients with equal channels, bits and times before the upload get equal shares. RECONSTRUCTED: the
paper's abstracts (arXiv:2505.00333) name no policy; these are the usual ones.
"""

from typing import Literal

import numpy as np

from fedloom.platform.errors import ExperimentError, unknown
from fedloom.platform.world.network import Channel
from fedloom.platform.world.rates import bandwidth_for, rate_bit_per_s

Policy = Literal["equal", "proportional", "min_max"]
POLICIES: tuple[Policy, ...] = ("equal", "proportional", "min_max")
MAX_HALVINGS = 200
UNUSED = 1e-12  # share of the band that the bisection may leave; it is dealt out afterwards


def bandwidth_shares(
    policy: Policy, channel: Channel, before_upload_s: np.ndarray, upload_bits: np.ndarray
) -> np.ndarray:
    """Divide a shared band.

    Args:
        policy: see above.
        channel: of a shared band, K clients.
        before_upload_s: download and training, shape (K,); only ``min_max`` reads it.
        upload_bits: shape (K,); who has none gets nothing from ``proportional`` and ``min_max``.

    Returns:
        Shares in Hz, shape (K,), of which the sum is the band; equal ones where nobody has bits to send.

    Raises:
        ExperimentError: the channel has no shared band, or there is no such policy.
    """
    snr_hz, band_hz = _shared(channel)
    equal: np.ndarray = np.full(len(snr_hz), band_hz / max(1, len(snr_hz)))
    if policy not in POLICIES:
        raise ExperimentError(f"key network.bandwidth_policy: {unknown('policy', policy, POLICIES)}")
    bits = np.asarray(upload_bits, dtype=np.float64)
    if policy == "equal" or not bits.any():
        return equal
    if policy == "proportional":
        return _filled(bits / np.log1p(snr_hz / equal), band_hz)
    start_s = np.asarray(before_upload_s, dtype=np.float64) + channel.delay_up_s
    return _min_max(snr_hz, band_hz, start_s, bits)


def upload_seconds(channel: Channel, bandwidth_hz: np.ndarray | None, upload_bits: np.ndarray) -> np.ndarray:
    """Return how long uploads take, shape (K,): bits over the rate, plus the delay.

    Args:
        channel: K clients.
        bandwidth_hz: shares of a shared band, shape (K,); ``None``: own links, or equal shares.
        upload_bits: shape (K,); no bits take no time but the delay, whatever the rate is.

    Raises:
        ExperimentError: shares are given, but the channel has no shared band.
    """
    rate = channel.uplink_bit_per_s
    if bandwidth_hz is not None:
        rate = rate_bit_per_s(np.asarray(bandwidth_hz, dtype=np.float64), _shared(channel)[0])
    bits = np.asarray(upload_bits, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.divide(bits, rate, out=np.zeros_like(bits), where=bits > 0) + channel.delay_up_s)


def _min_max(snr_hz: np.ndarray, band_hz: float, start_s: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Bisect the finish time between that of equal shares and that of everybody alone on the whole band.

    Whoever has bits needs more band the earlier the finish: the sum of the needs falls with it and crosses the band.
    """
    sending = bits > 0
    snr, start, size = snr_hz[sending], start_s[sending], bits[sending]
    everybody = np.full(len(snr), band_hz)
    shares = everybody / len(snr)
    low = float(np.max(start + size / rate_bit_per_s(everybody, snr)))
    high = float(np.max(start + size / rate_bit_per_s(shares, snr)))
    for _ in range(MAX_HALVINGS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        needed = bandwidth_for(size / (middle - start), snr)
        total = float(needed.sum())
        if total > band_hz:
            low = middle
            continue
        high, shares = middle, needed
        if total >= (1 - UNUSED) * band_hz:
            break
    result = np.zeros(len(bits))
    result[sending] = _filled(shares, band_hz)
    return result


def _filled(needs: np.ndarray, band_hz: float) -> np.ndarray:
    """Scale to the whole band."""
    return np.asarray(needs * (band_hz / needs.sum()))


def _shared(channel: Channel) -> tuple[np.ndarray, float]:
    if channel.snr_hz is None or channel.bandwidth_hz is None:
        raise ExperimentError(
            "key network.bandwidth_policy: only network.kind 'wireless' has a band to share. "
            "Set network.kind: wireless, or leave the policy out."
        )
    return channel.snr_hz, channel.bandwidth_hz
