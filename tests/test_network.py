"""The channel of a round: repeatable, independent of the company, and what each kind of network gives."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.platform.client import Client
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.world import network as module
from fedloom.platform.world.network import Channel, network_of

PER_CLIENT = ("snr_hz", "uplink_bit_per_s", "downlink_bit_per_s", "delay_up_s", "delay_down_s")
PROFILES = (
    {"name": "fast", "share": 1, "uplink_mbit_per_s": 20, "downlink_mbit_per_s": 100, "latency_s": 0.02},
    {"name": "slow", "share": 1, "uplink_mbit_per_s": 2, "latency_s": 0.3, "jitter_s": 0.5, "loss": 0.25},
    {"name": "free", "share": 1},
)
KINDS = ({"kind": "ideal"}, {"kind": "links"}, {"kind": "wireless"}, {"kind": "wireless", "fading": "rician"})


def clients(count):
    """Make clients that have the profiles in turn."""
    return [Client(id=f"c{i}", profile=str(PROFILES[i % 3]["name"]), rank=4, num_examples=10 + i) for i in range(count)]


def make(seed=0, profiles=PROFILES, population=30, **keys):
    document = {"seed": seed, "population": {"profiles": list(profiles)}, "network": keys}
    return network_of(Experiment.model_validate(document), clients(population))


def same(left: Channel, right: Channel) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in PER_CLIENT if has(left, name))


def has(channel: Channel, name: str) -> bool:
    return getattr(channel, name) is not None


@pytest.mark.parametrize("keys", KINDS, ids=str)
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(9)), size=st.integers(0, 9), number=st.integers(0, 10**6))
def test_a_clients_network_does_not_depend_on_the_cohort(keys, order, size, number):
    """Neither on its order nor on who else takes part, but for the equal share of a shared band."""
    network, everyone = make(**keys), clients(9)
    whole = network.channel(number, everyone)
    part = network.channel(number, [everyone[i] for i in order[:size]])

    for name in PER_CLIENT:
        if name == "uplink_bit_per_s" and whole.snr_hz is not None:
            continue
        assert has(whole, name) == has(part, name)
        if has(whole, name):
            np.testing.assert_array_equal(getattr(whole, name)[list(order[:size])], getattr(part, name))


@pytest.mark.parametrize("keys", KINDS, ids=str)
def test_arrays_are_float64_by_client_and_rates_are_positive(keys):
    """For an empty cohort too."""
    for size in (0, 1, 7):
        channel = make(**keys).channel(1, clients(size))
        arrays = {name: getattr(channel, name) for name in PER_CLIENT if has(channel, name)}
        assert {array.shape for array in arrays.values()} == {(size,)}
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float64)}
        assert all(np.all(array >= 0) for array in arrays.values())
        assert np.all(channel.uplink_bit_per_s > 0)
        assert np.all(channel.downlink_bit_per_s > 0)


@pytest.mark.parametrize("keys", KINDS[1:], ids=str)
def test_draws_repeat_by_seed_and_differ_by_seed_and_round(keys):
    """A second network of the same experiment gives the same; every other seed or round something else."""
    cohort = clients(6)
    channel = make(**keys).channel(3, cohort)

    assert same(channel, make(**keys).channel(3, cohort))
    assert not same(channel, make(**keys).channel(4, cohort))
    assert not same(channel, make(seed=1, **keys).channel(3, cohort))


def test_a_round_draws_for_its_cohort_alone(monkeypatch):
    """100 clients of 10,000: one draw of the place and one of the fading for each, and none at the start."""
    drawn = Counter()

    def counting(*names):
        drawn[names[-1]] += 1
        return hash(names) & (2**63 - 1)

    monkeypatch.setattr(module, "seed_for", counting)
    network = make(population=10_000, kind="wireless")
    assert not drawn
    cohort = clients(10_000)[-100:]
    network.channel(5, cohort)

    assert drawn == {client.id: 2 for client in cohort}


def test_ideal_takes_no_time():
    """Any number of bits divided by the rate is zero, and nothing is added."""
    channel = make(kind="ideal").channel(1, clients(5))

    assert channel.snr_hz is None
    assert channel.bandwidth_hz is None
    for rate in (channel.uplink_bit_per_s, channel.downlink_bit_per_s):
        np.testing.assert_array_equal(1e30 / rate, np.zeros(5))
    np.testing.assert_array_equal(channel.delay_up_s + channel.delay_down_s, np.zeros(5))


def test_links_have_the_rates_of_their_profiles():
    """Mbit are 10^6 bits, a quarter that is lost leaves three quarters, and no key is no limit."""
    channel = make(kind="links").channel(1, clients(3))

    assert channel.snr_hz is None
    np.testing.assert_allclose(channel.uplink_bit_per_s, [20e6, 0.75 * 2e6, np.inf])
    np.testing.assert_allclose(channel.downlink_bit_per_s, [100e6, np.inf, np.inf])
    np.testing.assert_allclose(channel.delay_up_s[[0, 2]], [0.02, 0.0])
    assert np.all(channel.delay_up_s >= [0.02, 0.3, 0.0])


def test_lost_bytes_are_sent_again():
    """With loss p, bytes are sent 1 / (1 - p) times in the mean; as many blocks, each sent until it arrives, agree."""
    blocks, loss = 100_000, 0.25
    profile = PROFILES[1] | {"loss": loss, "jitter_s": 0.0, "latency_s": 0.0}
    channel = make(kind="links", profiles=[PROFILES[0], profile, PROFILES[2]]).channel(1, clients(2)[1:])
    sent = np.random.Generator(np.random.PCG64(0)).geometric(1 - loss, blocks)

    simulated_s = sent.sum() * 1000 / 2e6
    standard_error_s = math.sqrt(loss * blocks) / (1 - loss) * 1000 / 2e6
    assert abs(blocks * 1000 / channel.uplink_bit_per_s[0] - simulated_s) < 4 * standard_error_s


def test_jitter_is_exponential_and_drawn_for_every_direction():
    """Mean and standard deviation are jitter_s, within four standard errors; up and down are uncorrelated."""
    network, cohort, rounds = make(kind="links"), clients(2)[1:], 5000
    channels = [network.channel(number, cohort) for number in range(rounds)]
    up = np.array([channel.delay_up_s[0] for channel in channels]) - 0.3
    down = np.array([channel.delay_down_s[0] for channel in channels]) - 0.3

    for delay in (up, down):
        assert delay.min() >= -1e-12
        assert abs(delay.mean() - 0.5) < 4 * 0.5 / math.sqrt(rounds)
        assert abs(delay.var() - 0.25) < 4 * 0.25 * math.sqrt(8 / rounds)
    for one, other in ((up, down), (up[1:], up[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(rounds)


@pytest.mark.parametrize(("keys", "kappa"), [({"fading": "rayleigh"}, 0), ({"fading": "rician", "rician_k_db": 3}, 2)])
def test_wireless_places_stay_and_fading_changes(keys, kappa):
    """Without fading every round is the same; with it, the ratio to that has mean 1 and forgets the round before."""
    cohort, rounds = clients(2), 4000
    still, moving = make(kind="wireless", fading="none"), make(kind="wireless", **keys)
    first = still.channel(0, cohort).snr_hz
    np.testing.assert_array_equal(first, still.channel(17, cohort).snr_hz)

    power = np.array([moving.channel(number, cohort).snr_hz for number in range(rounds)]) / first
    assert np.all(np.abs(power.mean(axis=0) - 1) < 4 / math.sqrt(rounds))
    variance = (1 + 2 * kappa) / (1 + kappa) ** 2  # at most 1, and the fourth central moment at most 9
    assert np.all(np.abs(power.var(axis=0) - variance) < 4 * math.sqrt(8 / rounds))
    for one, other in ((power[:, 0], power[:, 1]), (power[1:, 0], power[:-1, 0])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(rounds)


def test_a_population_is_spread_over_the_cell():
    """Half of the clients stand in the outer half of the area, within four standard errors; another seed moves them."""
    network = make(kind="wireless", population=4000)
    places = network.distances_m(clients(4000))
    middle = math.sqrt((10**2 + 500**2) / 2)

    assert np.all((places >= 10) & (places <= 500))
    assert abs((places > middle).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    elsewhere = make(seed=1, kind="wireless", population=4000).distances_m(clients(4000))
    assert abs(np.corrcoef(places, elsewhere)[0, 1]) < 4 / math.sqrt(4000)


def test_the_shared_band_and_its_equal_share():
    """Rates are Shannon's at B / K; the downlink is everybody's own."""
    channel = make(kind="wireless", bandwidth_mhz=5.0, downlink_mbit_per_s=50.0).channel(2, clients(4))

    assert channel.bandwidth_hz == 5e6
    np.testing.assert_allclose(channel.uplink_bit_per_s, 1.25e6 * np.log2(1 + channel.snr_hz / 1.25e6))
    np.testing.assert_array_equal(channel.downlink_bit_per_s, np.full(4, 50e6))
    np.testing.assert_array_equal(channel.delay_up_s + channel.delay_down_s, np.zeros(4))
    assert np.all(np.isinf(make(kind="wireless").channel(2, clients(4)).downlink_bit_per_s))


def test_an_unknown_profile_is_refused():
    """The nearest name is offered."""
    experiment = Experiment.model_validate({"population": {"profiles": list(PROFILES)}})
    stranger = Client(id="c0", profile="fats", rank=4, num_examples=1)

    with pytest.raises(ExperimentError, match=r"population\.profiles: no profile called 'fats'. Did you mean 'fast'"):
        network_of(experiment, [stranger])


def test_a_cell_that_amplifies_is_refused_at_the_start():
    """And only where the cell is used."""
    keys = {"min_distance_m": 0.1}

    with pytest.raises(ExperimentError, match=r"network\.min_distance_m"):
        make(kind="wireless", **keys)
    make(kind="ideal", **keys)
