"""Shannon's rate, its slope and their inverses: laws, the textbook's Lambert W, and the ends of the range."""

import numpy as np
import pytest
from conditions import numbers

from fedloom.platform.world.rates import (
    bandwidth_at_slope,
    bandwidth_for,
    efficiency_at_slope,
    rate_bit_per_s,
    rate_slope,
)


@pytest.fixture
def pairs():
    """Return bandwidths from a millionth to a thousand times p h / N0, which itself spans 15 decades."""
    draw = numbers(0)
    snr_hz = 10 ** draw.uniform(-3, 12, 10_000)
    return snr_hz * 10 ** draw.uniform(-6, 3, 10_000), snr_hz


def test_the_rate_is_that_of_shannon():
    assert rate_bit_per_s([1.0, 2e6, 1e6], [3.0, 2e6, 7e6]) == pytest.approx([2.0, 2e6, 3e6], rel=1e-14)


def test_the_rate_is_increasing_and_concave_in_the_bandwidth():
    bandwidth = np.linspace(1, 1e6, 1000)
    rates = rate_bit_per_s(bandwidth, 3e5)

    assert (np.diff(rates) > 0).all()
    assert (np.diff(rates, 2) < 0).all()


def test_the_slope_is_positive_falls_and_is_the_derivative(pairs):
    bandwidth, snr_hz = pairs
    step = 1e-4
    difference = rate_bit_per_s(bandwidth * (1 + step), snr_hz) - rate_bit_per_s(bandwidth * (1 - step), snr_hz)

    assert (rate_slope(bandwidth, snr_hz) > 0).all()
    assert (rate_slope(2 * bandwidth, snr_hz) < rate_slope(bandwidth, snr_hz)).all()
    # A central difference is off by step^2 and loses digits by rounding, both below 1e-5 up to 100 p h / N0.
    moderate = bandwidth < 100 * snr_hz
    expected = (difference / (2 * step * bandwidth))[moderate]
    assert rate_slope(bandwidth, snr_hz)[moderate] == pytest.approx(expected, rel=1e-5)


def test_the_bandwidth_for_a_rate_undoes_the_rate(pairs):
    bandwidth, snr_hz = pairs

    # Rounding the rate alone moves b by 1e-16 times 2 b / snr, which is at most 1e-12 here; so does each step.
    assert bandwidth_for(rate_bit_per_s(bandwidth, snr_hz), snr_hz) == pytest.approx(bandwidth, rel=1e-10)


def test_the_rate_of_the_bandwidth_for_a_rate_is_that_rate(pairs):
    snr_hz = pairs[1]
    rates = snr_hz / np.log(2) * numbers(1).uniform(1e-9, 1 - 1e-9, len(snr_hz))

    assert rate_bit_per_s(bandwidth_for(rates, snr_hz), snr_hz) == pytest.approx(rates, rel=1e-13)


def test_the_bandwidth_at_a_slope_undoes_the_slope(pairs):
    bandwidth, snr_hz = pairs
    moderate = bandwidth < 10 * snr_hz  # further out the slope is a difference of nearly equal numbers
    slopes = rate_slope(bandwidth, snr_hz)

    assert bandwidth_at_slope(slopes, snr_hz)[moderate] == pytest.approx(bandwidth[moderate], rel=1e-10)
    assert rate_slope(bandwidth_at_slope(slopes, snr_hz), snr_hz) == pytest.approx(slopes, rel=1e-8)


def test_the_inverses_are_the_closed_forms():
    """With y = R ln 2 / g, -y (1 + g / b) is W_-1(-y e^-y); at the slope s, v - s ln 2 - 1 is W_0(-e^-(s ln 2 + 1)).

    Lambert's W of z is the w with w e^w = z: on the branch W_-1 it is at most -1, on W_0 at least -1.
    """
    y = np.linspace(0.01, 0.99, 200)
    lower = -y * (1 + 1 / bandwidth_for(y / np.log(2), 1.0))
    m = np.linspace(0.01, 20, 200)
    upper = efficiency_at_slope(m / np.log(2)) - m - 1

    assert (lower < -1).all()
    assert lower * np.exp(lower) == pytest.approx(-y * np.exp(-y), rel=1e-11)
    assert (upper > -1).all()
    assert upper * np.exp(upper) == pytest.approx(-np.exp(-(m + 1)), rel=1e-11, abs=1e-14)


def test_the_ends_of_the_range():
    limit = 3.0 / np.log(2)

    assert rate_bit_per_s([0.0, np.inf, 5.0], [3.0, 3.0, 0.0]) == pytest.approx([0.0, limit, 0.0])
    assert rate_slope([0.0, np.inf, 5.0], [3.0, 3.0, 0.0]) == pytest.approx([np.inf, 0.0, 0.0])
    assert bandwidth_for([0.0, limit, 2 * limit, 1.0], [3.0, 3.0, 3.0, 0.0]).tolist() == [0.0, np.inf, np.inf, np.inf]
    assert bandwidth_at_slope([0.0, 1e4, 1.0], [3.0, 3.0, 0.0]).tolist() == [np.inf, 0.0, 0.0]


def test_rates_far_below_the_limit_do_not_overflow():
    rates = 10.0 ** np.arange(-290, 0, 10)

    assert rate_bit_per_s(bandwidth_for(rates, 1.0), 1.0) == pytest.approx(rates, rel=1e-11, abs=0)


def test_next_to_the_limit_bandwidths_are_right_as_long_as_they_are_finite():
    """R ln 2 = g (1 - g / 2b + ...); in the last digits of R, b is decided by few bits."""
    snr_hz = np.repeat(10 ** numbers(3).uniform(-3, 12, 500), 15)
    rates = np.tile(1 - 10.0 ** -np.arange(1, 16), 500) * (snr_hz / np.log(2))
    missing = 1 - rates * np.log(2) / snr_hz
    last = np.nextafter(snr_hz / np.log(2), 0)

    assert bandwidth_for(rates, snr_hz) == pytest.approx(0.5 * snr_hz / missing, rel=0.3)
    assert (bandwidth_for(last, snr_hz) > 1e14 * snr_hz).all()


def test_they_broadcast_over_cases_and_clients():
    rates, snr_hz = np.array([[1.0], [2.0]]), np.array([4.0, 5.0, 6.0])
    table = bandwidth_for(rates, snr_hz)

    assert table.shape == (2, 3)
    assert table[1, 2] == bandwidth_for(2.0, 6.0)
