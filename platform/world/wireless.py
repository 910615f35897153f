"""One cell with a base station in its middle: where clients stand, what the path and the fading leave of their signal.

    distance    uniform over the area of the annulus min_distance_m <= d <= cell_radius_m
    path loss   PL dB = path_loss_at_1_km_db + path_loss_db_per_decade log10(d / 1 km)
    fading      |x|^2 of mean 1, with x = sqrt(kappa / (kappa + 1)) + sqrt(1 / (kappa + 1)) z, z complex Gaussian,
                E |z|^2 = 1.  rayleigh: kappa = 0,  rician: kappa = 10 ** (rician_k_db / 10),  none: |x|^2 = 1
    signal      snr_hz = p h / N0,  h = 10 ** (-PL dB / 10) |x|^2,  p in W, N0 in W/Hz

A client with bandwidth b in Hz then sends b log2(1 + snr_hz / b) bit/s (``rates.py``). Antennas have no gain, and
other cells do not interfere. The angle at which a client stands changes nothing and is not drawn.

RECONSTRUCTED: the standard model of an uplink that is shared by frequency. The abstracts of the SOFT and TSFA paper
(arXiv:2505.00333) say that the channel is wireless, and no more; model and defaults are ours.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_world import NetworkSection

Array = NDArray[np.float64]
SMALLEST = 2.0**-54  # half of the least distance between uniform draws: keeps a fade, and with it a rate, above zero


def watt(power_dbm: float) -> float:
    """Return a power in watts: 0 dBm is 1 mW."""
    return float(10 ** (power_dbm / 10 - 3))


def check_cell(network: NetworkSection) -> None:
    """Refuse a cell in which the path would amplify the signal.

    Raises:
        ExperimentError: the path loss at ``min_distance_m`` is below 0 dB.
    """
    loss_db = float(path_loss_db(network, np.array(network.min_distance_m)))
    if loss_db < 0:
        raise ExperimentError(
            f"key network.min_distance_m: at {network.min_distance_m:g} m the path loss is {loss_db:.4g} dB, but it "
            f"cannot be below 0 dB. {_remedy(network)}"
        )


def _remedy(network: NetworkSection) -> str:
    closest_m = 1000 * 10 ** (-network.path_loss_at_1_km_db / network.path_loss_db_per_decade)
    if 1.02 * closest_m < network.cell_radius_m:
        return f"Set it to {1.01 * closest_m:.3g} or more."
    return "Raise network.path_loss_at_1_km_db."


def distances_m(network: NetworkSection, uniforms: Array) -> Array:
    """Return distances to the base station, shape (K,), from uniform numbers in [0, 1): areas are equally likely."""
    inner, outer = network.min_distance_m**2, network.cell_radius_m**2
    return np.clip(np.sqrt(inner + uniforms * (outer - inner)), network.min_distance_m, network.cell_radius_m)


def path_loss_db(network: NetworkSection, distance_m: Array) -> Array:
    """Return the path loss at distances of any shape."""
    return np.asarray(
        network.path_loss_at_1_km_db + network.path_loss_db_per_decade * np.log10(np.asarray(distance_m) / 1000)
    )


def fading(network: NetworkSection, uniforms: Array) -> Array:
    """Return |x|^2, shape (K,), from uniform numbers in [0, 1) of shape (K, 2): of mean 1, and never zero."""
    if network.fading == "none":
        return np.ones(len(uniforms))
    # |z|^2 is exponential, z's angle uniform, and both are independent.
    power = -np.log1p(-np.maximum(uniforms[:, 0], SMALLEST))
    if network.fading == "rayleigh":
        return power
    kappa = 10 ** (network.rician_k_db / 10)
    angle = 2 * math.pi * uniforms[:, 1]
    along, across = math.sqrt(kappa) + np.sqrt(power) * np.cos(angle), np.sqrt(power) * np.sin(angle)
    return np.asarray(np.maximum((along**2 + across**2) / (kappa + 1), SMALLEST))


def snr_hz(network: NetworkSection, distance_m: Array, fading_power: Array) -> Array:
    """Return p h / N0 in Hz, shape (K,): the bandwidth at which signal and noise are equally strong."""
    power_over_noise_hz = watt(network.transmit_power_dbm) / watt(network.noise_dbm_per_hz)
    return power_over_noise_hz * 10 ** (-path_loss_db(network, distance_m) / 10) * np.asarray(fading_power)
