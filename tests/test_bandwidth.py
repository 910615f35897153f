"""Shares of a band: they add up, equals get equal shares, and nobody beats min_max."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.platform.errors import ExperimentError
from fedloom.platform.world.bandwidth import POLICIES, bandwidth_shares, upload_seconds
from fedloom.platform.world.network import Channel
from fedloom.platform.world.rates import rate_bit_per_s

BAND_HZ = 1e7


def shared(snr_hz, band_hz=BAND_HZ, delay_up_s=0.0):
    """Make the channel of a shared band."""
    snr = np.asarray(snr_hz, dtype=np.float64)
    return Channel(
        snr_hz=snr,
        bandwidth_hz=band_hz,
        uplink_bit_per_s=rate_bit_per_s(np.full(len(snr), band_hz / max(1, len(snr))), snr),
        downlink_bit_per_s=np.full(len(snr), np.inf),
        delay_up_s=np.zeros(len(snr)) + delay_up_s,
        delay_down_s=np.zeros(len(snr)),
    )


def links(uplink_bit_per_s, delay_up_s):
    rate, delay = np.array(uplink_bit_per_s, dtype=np.float64), np.array(delay_up_s, dtype=np.float64)
    nothing = np.zeros(len(rate))
    return Channel(
        snr_hz=None,
        bandwidth_hz=None,
        uplink_bit_per_s=rate,
        downlink_bit_per_s=rate,
        delay_up_s=delay,
        delay_down_s=nothing,
    )


def finishes_s(policy, channel, before, bits):
    return before + upload_seconds(channel, bandwidth_shares(policy, channel, before, bits), bits)


@st.composite
def worlds(draw, smallest=1):
    """Draw a channel from deep fades to close by, times before the upload, and bits."""
    count = draw(st.integers(smallest, 12))

    def column(low, high):
        return np.array(draw(st.lists(st.floats(low, high), min_size=count, max_size=count)))

    snr = BAND_HZ * 10 ** column(-5, 5)
    return shared(snr, delay_up_s=column(0, 3)), column(0, 100), 10 ** column(3, 9)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_shares_are_positive_and_add_up_to_the_band(policy, world):
    """Never to more than it, up to rounding, and nothing is left over."""
    shares = bandwidth_shares(policy, *world)

    assert shares.shape == world[1].shape
    assert np.all(shares > 0)
    assert shares.sum() == pytest.approx(BAND_HZ, rel=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_equal_channels_give_equal_shares(policy, count):
    """With equal bits and times before the upload."""
    shares = bandwidth_shares(policy, shared(np.full(count, 3e8)), np.full(count, 4.0), np.full(count, 1e6))

    np.testing.assert_allclose(shares, np.full(count, BAND_HZ / count), rtol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30, deadline=None)
@given(world=worlds(), data=st.data())
def test_shares_follow_the_clients(policy, world, data):
    """Another order of the cohort is another order of the shares."""
    channel, before, bits = world
    order = data.draw(st.permutations(range(len(bits))))
    moved = shared(channel.snr_hz[order], delay_up_s=channel.delay_up_s[order])

    np.testing.assert_allclose(
        bandwidth_shares(policy, moved, before[order], bits[order]),
        bandwidth_shares(policy, channel, before, bits)[order],
        rtol=1e-6,
    )


@settings(max_examples=200, deadline=None)
@given(world=worlds(smallest=2))
def test_under_min_max_all_finish_at_the_same_time(world):
    """Who finished before the last one could have given it some of its band."""
    finishes = finishes_s("min_max", *world)

    np.testing.assert_allclose(finishes, np.full(len(finishes), finishes.max()), rtol=1e-7)


@settings(max_examples=200, deadline=None)
@given(world=worlds())
def test_min_max_is_never_later_than_the_other_policies(world):
    """Their shares are among those that it chooses from."""
    latest = {policy: finishes_s(policy, *world).max() for policy in POLICIES}

    assert latest["min_max"] <= latest["equal"] * (1 + 1e-12)
    assert latest["min_max"] <= latest["proportional"] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_division_finishes_earlier_than_min_max(seed):
    """Neither 20,000 random ones nor small exchanges between any two clients."""
    rng = np.random.Generator(np.random.PCG64(seed))
    count = 2 + seed
    channel = shared(BAND_HZ * 10 ** rng.uniform(-2, 3, count))
    before, bits = rng.uniform(0, 3, count), 10 ** rng.uniform(6, 8, count)
    best = bandwidth_shares("min_max", channel, before, bits)
    latest = (before + upload_seconds(channel, best, bits)).max()

    exchanges = np.concatenate([np.eye(count)[:, None] - np.eye(count)[None]]).reshape(-1, count)
    others = np.concatenate(
        [
            BAND_HZ * rng.dirichlet(np.ones(count), 10_000),
            BAND_HZ * rng.dirichlet(1 + 100 * best / BAND_HZ, 10_000),
            *(best + scale * best.min() * exchanges for scale in (1e-4, 1e-2, 0.5)),
        ]
    )
    with np.errstate(divide="ignore"):
        theirs = (before + bits / rate_bit_per_s(others, channel.snr_hz)).max(axis=1)
    assert theirs.min() >= latest * (1 - 1e-9)
    assert theirs.min() <= latest * 1.2  # the sample reaches close to the best, else it would prove little


def test_min_max_of_two_by_hand():
    """Both rates are those of the wide band, b log2(1 + 1): the bits 1 : 3 need bands 1 : 3 where snr / b is equal."""
    shares = bandwidth_shares("min_max", shared([2.5e6, 7.5e6]), np.zeros(2), np.array([1e6, 3e6]))

    np.testing.assert_allclose(shares, [2.5e6, 7.5e6], rtol=1e-9)
    np.testing.assert_allclose(upload_seconds(shared([2.5e6, 7.5e6]), shares, np.array([1e6, 3e6])), [0.4, 0.4])


def test_a_late_client_gets_the_band():
    """Who starts 1,000 s after the others needs nearly all, and those who wait nearly nothing."""
    before = np.array([0.0, 0.0, 1000.0])
    shares = bandwidth_shares("min_max", shared([1e9, 1e8, 1e8]), before, np.full(3, 1e7))

    assert shares[2] > 0.99 * BAND_HZ
    assert np.all(shares[:2] > 0)


def test_delay_of_the_upload_counts_as_time_before_it():
    """The finish is what matters: waiting before or during the upload gives the same shares."""
    snr, waits, bits = [1e9, 1e8], np.array([1.0, 0.0]), np.full(2, 1e8)

    np.testing.assert_allclose(
        bandwidth_shares("min_max", shared(snr, delay_up_s=waits), np.zeros(2), bits),
        bandwidth_shares("min_max", shared(snr), waits, bits),
    )


def test_proportional_follows_bits_and_efficiency():
    """Twice the bits twice the band; 2 bit/s/Hz at an equal share need half of what 1 bit/s/Hz needs."""
    half = BAND_HZ / 2

    twice = bandwidth_shares("proportional", shared([half, half]), np.zeros(2), np.array([1e6, 2e6]))
    worse = bandwidth_shares("proportional", shared([3 * half, half]), np.zeros(2), np.array([1e6, 1e6]))

    np.testing.assert_allclose(twice, [BAND_HZ / 3, 2 * BAND_HZ / 3])
    np.testing.assert_allclose(worse, [BAND_HZ / 3, 2 * BAND_HZ / 3])


@pytest.mark.parametrize("policy", ["proportional", "min_max"])
def test_who_has_nothing_to_send_needs_no_band(policy):
    """However late it is, and it takes no time; where nobody has anything, shares are equal."""
    channel, bits = shared([1e8, 1e8, 1e8]), np.array([1e6, 0.0, 1e6])
    shares = bandwidth_shares(policy, channel, np.array([0.0, 100.0, 0.0]), bits)

    np.testing.assert_allclose(shares, [BAND_HZ / 2, 0.0, BAND_HZ / 2])
    assert upload_seconds(channel, shares, bits)[1] == 0
    np.testing.assert_allclose(bandwidth_shares(policy, channel, np.zeros(3), np.zeros(3)), np.full(3, BAND_HZ / 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_cohort_has_no_shares(policy):
    """There may be rounds in which nobody is reachable."""
    assert bandwidth_shares(policy, shared([]), np.zeros(0), np.zeros(0)).shape == (0,)


def test_upload_times_by_hand():
    """Links: bits over the rate plus the delay. A shared band: at the shares given, else at equal ones."""
    np.testing.assert_allclose(
        upload_seconds(links([1e6, 4e6, np.inf], [0.0, 0.5, 0.1]), None, np.full(3, 2e6)), [2.0, 1.0, 0.1]
    )
    channel = shared([BAND_HZ / 4, 3 * BAND_HZ / 4], delay_up_s=1.0)
    quarter = np.array([BAND_HZ / 4, 3 * BAND_HZ / 4])  # 1 bit/s/Hz each
    np.testing.assert_allclose(upload_seconds(channel, quarter, quarter), [2.0, 2.0])
    half = np.full(2, BAND_HZ / 2)
    np.testing.assert_allclose(upload_seconds(channel, None, half), upload_seconds(channel, half, half))
    np.testing.assert_array_equal(
        upload_seconds(channel, np.array([0.0, BAND_HZ]), half), [np.inf, 1 + 0.5 / np.log2(1.75)]
    )


def test_own_links_have_no_band_to_share():
    """Dividing it, or giving shares of it, is refused with what would help."""
    channel = links([1e6], [0.0])

    with pytest.raises(ExperimentError, match=r"Set network\.kind: wireless"):
        bandwidth_shares("equal", channel, np.zeros(1), np.ones(1))
    with pytest.raises(ExperimentError, match=r"Set network\.kind: wireless"):
        upload_seconds(channel, np.ones(1), np.ones(1))


def test_an_unknown_policy_is_refused():
    """The nearest name is offered."""
    with pytest.raises(ExperimentError, match=r"no policy called 'min-max'\. Did you mean 'min_max'"):
        bandwidth_shares("min-max", shared([1e8]), np.zeros(1), np.ones(1))
