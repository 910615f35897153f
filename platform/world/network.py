"""How fast bytes move in a round: the channel of a cohort, by ``network.kind``.

    ideal      no transfer takes time
    links      every client has its own link, as its profile says
    wireless   the uplink is one band that the cohort shares; the model stands in ``wireless.py``, RECONSTRUCTED

A channel is a function of the experiment, the round and the cohort. What is drawn for a client comes from the
experiment's seed, the client's id and, but for its place in the cell, the round: never from the rest of the cohort.
Nothing is drawn for clients that do not take part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedloom.platform.client import Client
from fedloom.platform.errors import ExperimentError, unknown
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import NetworkSection, Profile
from fedloom.platform.seeds import seed_for
from fedloom.platform.world.rates import rate_bit_per_s
from fedloom.platform.world.wireless import check_cell, distances_m, fading, snr_hz


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """The network of one round, for a cohort of K clients in its order. Every array is float64 of shape (K,).

    Attributes:
        snr_hz: p_k h_k / N0, received power over the noise's density, of a shared band; ``None`` without one.
        bandwidth_hz: the band that the cohort shares; ``None`` likewise.
        uplink_bit_per_s: of own links, ``inf`` where unlimited; of a shared band: at an equal share.
        downlink_bit_per_s: ``inf`` where unlimited.
        delay_up_s: latency and jitter, added to the upload.
        delay_down_s: likewise, added to the download.
    """

    snr_hz: np.ndarray | None
    bandwidth_hz: float | None
    uplink_bit_per_s: np.ndarray
    downlink_bit_per_s: np.ndarray
    delay_up_s: np.ndarray
    delay_down_s: np.ndarray


class Network(Protocol):
    """Gives the channel of a round; a frozen value without state."""

    def channel(self, number: int, cohort: Sequence[Client]) -> Channel:
        """Return the channel of round ``number``: the same for the same experiment, round and clients."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IdealNetwork:
    """``network.kind: ideal``: no transfer takes time."""

    def channel(self, number: int, cohort: Sequence[Client]) -> Channel:
        """Return unlimited rates and no delays."""
        unlimited, nothing = np.full(len(cohort), np.inf), np.zeros(len(cohort))
        return Channel(
            snr_hz=None,
            bandwidth_hz=None,
            uplink_bit_per_s=unlimited,
            downlink_bit_per_s=unlimited,
            delay_up_s=nothing,
            delay_down_s=nothing,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNetwork:
    """``network.kind: links``: every client has its own link in each direction.

    A share ``loss`` of the bytes is lost and sent again until all have arrived, so that the rate for new bytes is
    (1 - loss) times that of the link. Each transfer is delayed by ``latency_s`` and an exponential time of mean
    ``jitter_s``, which is drawn for every client, round and direction.
    """

    seed: int
    profiles: Mapping[str, Profile]

    def channel(self, number: int, cohort: Sequence[Client]) -> Channel:
        """Return the links of the clients' profiles, and this round's jitter."""
        profiles = [self.profiles[client.profile] for client in cohort]
        kept = 1 - _array([profile.loss for profile in profiles])
        latency_s = _array([profile.latency_s for profile in profiles])
        jitter_s = _array([profile.jitter_s for profile in profiles])
        jitter = np.zeros((len(cohort), 2))
        if jitter_s.any():
            uniforms = _uniforms(cohort, 2, self.seed, "network", "jitter", number)
            jitter = -np.log1p(-uniforms) * jitter_s[:, None]
        return Channel(
            snr_hz=None,
            bandwidth_hz=None,
            uplink_bit_per_s=kept * _bit_per_s([profile.uplink_mbit_per_s for profile in profiles]),
            downlink_bit_per_s=kept * _bit_per_s([profile.downlink_mbit_per_s for profile in profiles]),
            delay_up_s=latency_s + jitter[:, 0],
            delay_down_s=latency_s + jitter[:, 1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WirelessNetwork:
    """``network.kind: wireless``: one cell whose uplink band the cohort shares. RECONSTRUCTED, see ``wireless.py``.

    A client stands where it stands for the whole run; its fading is constant in a round and independent of that of
    every other round and client.
    """

    seed: int
    section: NetworkSection

    def distances_m(self, cohort: Sequence[Client]) -> np.ndarray:
        """Return how far the clients stand from the base station, shape (K,)."""
        return distances_m(self.section, _uniforms(cohort, 1, self.seed, "network", "distance")[:, 0])

    def channel(self, number: int, cohort: Sequence[Client]) -> Channel:
        """Return this round's signal strengths; the uplink's rates are those at an equal share of the band."""
        section, size = self.section, len(cohort)
        draws = 0 if section.fading == "none" else 2
        fades = fading(section, _uniforms(cohort, draws, self.seed, "network", "fading", number))
        snr = snr_hz(section, self.distances_m(cohort), fades)
        bandwidth_hz = 1e6 * section.bandwidth_mhz
        nothing = np.zeros(size)
        return Channel(
            snr_hz=snr,
            bandwidth_hz=bandwidth_hz,
            uplink_bit_per_s=rate_bit_per_s(np.full(size, bandwidth_hz / max(1, size)), snr),
            downlink_bit_per_s=_bit_per_s([section.downlink_mbit_per_s] * size),
            delay_up_s=nothing,
            delay_down_s=nothing,
        )


def network_of(experiment: Experiment, clients: Sequence[Client]) -> Network:
    """Return the experiment's network; nothing is drawn before a round asks for it.

    Raises:
        ExperimentError: a client's profile is not in the experiment, or the cell's path loss is below 0 dB.
    """
    section = experiment.network
    profiles = {profile.name: profile for profile in experiment.population.profiles}
    strangers = {client.profile for client in clients} - set(profiles)
    if strangers:
        raise ExperimentError(f"key population.profiles: {unknown('profile', min(strangers), profiles)}")
    if section.kind == "links":
        return LinkNetwork(seed=experiment.seed, profiles=profiles)
    if section.kind == "wireless":
        check_cell(section)
        return WirelessNetwork(seed=experiment.seed, section=section)
    return IdealNetwork()


def _uniforms(cohort: Sequence[Client], count: int, *names: str | int) -> np.ndarray:
    """Draw every client's own numbers in [0, 1), shape (K, count): their seed is the names and the client's id."""
    if not count:
        return np.zeros((len(cohort), 0))
    seeds = (seed_for(*names, "client", client.id) for client in cohort)
    rows = [np.random.Generator(np.random.PCG64(seed)).random(count) for seed in seeds]
    return np.array(rows).reshape(len(cohort), count)


def _bit_per_s(rates_mbit_per_s: Sequence[float | None]) -> np.ndarray:
    return _array([np.inf if rate is None else 1e6 * rate for rate in rates_mbit_per_s])


def _array(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)
