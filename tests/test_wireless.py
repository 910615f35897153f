"""The cell: units and formulas by hand, places uniform over the area, and fading of the right moments."""

import math

import numpy as np
import pytest

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_world import NetworkSection
from fedloom.platform.world.rates import rate_bit_per_s
from fedloom.platform.world.wireless import (
    check_cell,
    distances_m,
    fading,
    path_loss_db,
    snr_hz,
    watt,
)

DRAWS = 200_000
SIGMAS = 4  # of the standard error: a right model fails one such check in 16,000, and draws have a fixed seed


def section(**keys):
    return NetworkSection(kind="wireless", **keys)


def uniforms(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).random(shape)


def rice_cumulants(kappa):
    """Variance and fourth central moment of |x|^2: a noncentral chi-square, df 2, nc 2 kappa, over 2 (kappa + 1)."""
    unit = 1 / (2 * (kappa + 1))
    variance = unit**2 * 2 * (2 + 2 * 2 * kappa)
    fourth_cumulant = unit**4 * 48 * (2 + 4 * 2 * kappa)
    return variance, fourth_cumulant + 3 * variance**2


def test_decibels_are_converted_as_by_hand():
    """0 dBm is a milliwatt, 30 dBm a watt, 23 dBm a fifth of one; -174 dBm/Hz is 3.98e-21 W/Hz."""
    assert watt(0) == pytest.approx(1e-3)
    assert watt(30) == pytest.approx(1.0)
    assert watt(23) == pytest.approx(0.199526, rel=1e-5)
    assert watt(-174) == pytest.approx(3.98107e-21, rel=1e-5)


def test_one_client_by_hand():
    """250 m: 128.1 - 37.6 * 0.60206 = 105.4625 dB; 23 + 174 - 105.4625 = 91.5375 dB Hz; 1 MHz carries 10.48 Mbit/s."""
    network, distance_m = section(), np.array([250.0])

    loss_db = path_loss_db(network, distance_m)
    signal = snr_hz(network, distance_m, np.ones(1))

    assert loss_db == pytest.approx([105.46254], abs=1e-4)
    assert signal == pytest.approx([1.424796e9], rel=1e-4)
    assert rate_bit_per_s(np.array([1e6]), signal) == pytest.approx([10.4776e6], rel=1e-4)


def test_path_loss_is_what_the_keys_say():
    """At 1 km it is the one key, ten times farther the other one more."""
    network = section(path_loss_at_1_km_db=100.0, path_loss_db_per_decade=30.0)

    np.testing.assert_allclose(path_loss_db(network, np.array([100.0, 1000.0, 10_000.0])), [70.0, 100.0, 130.0])


@pytest.mark.parametrize(
    ("change", "decibels"),
    [
        ({"transmit_power_dbm": 33.0}, 10.0),
        ({"noise_dbm_per_hz": -164.0}, -10.0),
        ({"path_loss_at_1_km_db": 118.1}, 10.0),
    ],
)
def test_ten_decibels_are_a_factor_of_ten(change, decibels):
    """Power and noise enter once each, and the right way round."""
    place, fade = np.array([20.0, 400.0]), np.array([1.0, 0.3])

    np.testing.assert_allclose(
        snr_hz(section(**change), place, fade), snr_hz(section(), place, fade) * 10 ** (decibels / 10)
    )


@pytest.mark.parametrize(("inner", "outer"), [(10.0, 500.0), (300.0, 500.0), (0.001, 1.0)])
def test_places_are_uniform_over_the_area(inner, outer):
    """d^2 is uniform between the squares: the largest gap between the distribution functions passes Kolmogorov's."""
    places = distances_m(section(min_distance_m=inner, cell_radius_m=outer), uniforms(DRAWS))

    assert inner <= places.min()
    assert places.max() <= outer
    share = np.sort((places**2 - inner**2) / (outer**2 - inner**2))
    gap = np.abs(share - (np.arange(DRAWS) + 0.5) / DRAWS).max()
    assert gap < 1.95 / math.sqrt(DRAWS)


def test_the_extreme_draws_stay_inside():
    """Rounding takes nobody out of the annulus."""
    network = section(min_distance_m=0.1, cell_radius_m=0.3)
    places = distances_m(network, np.array([0.0, 1 - 2.0**-53]))

    assert places[0] == pytest.approx(0.1)
    assert np.all((places >= 0.1) & (places <= 0.3))


@pytest.mark.parametrize(
    ("kind", "k_db"), [("rayleigh", -math.inf), ("rician", -20.0), ("rician", 6.0), ("rician", 20.0)]
)
def test_fading_has_mean_one_and_its_variance(kind, k_db):
    """Within four standard errors: sqrt(var / n) of the mean, sqrt((mu4 - var^2) / n) of the variance."""
    keys = {} if kind == "rayleigh" else {"rician_k_db": k_db}
    power = fading(section(fading=kind, **keys), uniforms(DRAWS, 2))
    variance, fourth = rice_cumulants(10 ** (k_db / 10))

    assert power.min() > 0
    assert abs(power.mean() - 1) < SIGMAS * math.sqrt(variance / DRAWS)
    assert abs(power.var() - variance) < SIGMAS * math.sqrt((fourth - variance**2) / DRAWS)


def test_rayleigh_power_is_exponential():
    """Its whole distribution function, not only its moments."""
    power = np.sort(fading(section(fading="rayleigh"), uniforms(DRAWS, 2)))

    gap = np.abs(-np.expm1(-power) - (np.arange(DRAWS) + 0.5) / DRAWS).max()
    assert gap < 1.95 / math.sqrt(DRAWS)


def test_rician_fading_lies_between_rayleigh_and_none():
    """No direct path is Rayleigh's fading; nothing but the direct path is none."""
    draws = uniforms(1000, 2)

    scattered = fading(section(fading="rician", rician_k_db=-50.0), draws)
    direct = fading(section(fading="rician", rician_k_db=50.0), draws)
    np.testing.assert_allclose(scattered, fading(section(fading="rayleigh"), draws), atol=0.05)
    np.testing.assert_allclose(direct, np.ones(1000), atol=0.05)
    np.testing.assert_array_equal(fading(section(fading="none"), draws), np.ones(1000))


@pytest.mark.parametrize("kind", ["rayleigh", "rician"])
def test_the_deepest_fade_leaves_something(kind):
    """A uniform draw of 0, or one that sets both paths against each other, gives no rate of zero."""
    draws = np.array([[0.0, 0.0], [-math.expm1(-1.0), 0.5]])  # with rician_k_db 0 the second cancels the direct path

    assert np.all(fading(section(fading=kind, rician_k_db=0.0), draws) > 0)


def test_a_path_that_amplifies_is_refused():
    """The message names a distance, and that distance is accepted."""
    with pytest.raises(
        ExperimentError, match=r"network\.min_distance_m: at 0\.1 m .* Set it to 0\.396 or more"
    ) as found:
        check_cell(section(min_distance_m=0.1))

    check_cell(section(min_distance_m=float(str(found.value).split("Set it to ")[1].split(" ")[0])))
    check_cell(section())


def test_a_cell_that_lies_wholly_too_close_is_refused():
    """No distance in it would do: the message names the other key."""
    with pytest.raises(ExperimentError, match=r"Raise network\.path_loss_at_1_km_db"):
        check_cell(section(path_loss_at_1_km_db=1.0))
