"""What is beyond noise: intervals, tests and fronts against slow, obvious ones."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedloom.tuning.comparison.noise import holm, interval_of, pareto_front, sign_flip_p, tests_of

tests_of.__test__ = False  # its name is no test's
SHARES = st.floats(0, 1, allow_nan=False)
P_VALUES = st.lists(st.one_of(SHARES, st.just(math.nan)), max_size=8)


def seeded(*values):
    return dict(enumerate(values))


def test_an_interval_is_student_s_t():
    """Mean and mean +- t sd / sqrt(n), with the quantile of two degrees of freedom from a table: 4.303."""
    interval = interval_of([0.5, 0.6, 0.7])

    assert interval.mean == pytest.approx(0.6)
    assert interval.high - interval.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    assert interval.mean - interval.low == pytest.approx(interval.high - interval.mean)


def test_one_seed_has_no_interval_and_no_test():
    interval = interval_of([0.5])
    (test,) = tests_of({"a": seeded(0.5), "b": seeded(0.9)})

    assert (interval.low, interval.high) == (None, None)
    assert (test.test, test.verdict, test.difference) == ("none", "not testable", pytest.approx(-0.4))
    assert math.isnan(test.p_holm)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 2000 draws of five normal values, 95% of the intervals hold the mean, within four standard errors."""
    generator = np.random.default_rng(0)
    intervals = [interval_of(list(generator.normal(0.7, 0.02, 5))) for _ in range(2000)]
    share = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])

    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_shared_seeds_are_compared_seed_by_seed():
    """The paired t test on what both have, in whatever order it comes; what only one has does not count."""
    first, second = {0: 0.70, 1: 0.74, 2: 0.78, 9: 0.1}, {2: 0.77, 1: 0.72, 0: 0.69, 5: 0.9}
    (test,) = tests_of({"a": first, "b": second})
    reference = stats.ttest_rel([0.70, 0.74, 0.78], [0.69, 0.72, 0.77])

    assert (test.test, test.num_seeds) == ("paired t", 3)
    assert test.p == pytest.approx(reference.pvalue)
    assert (test.low, test.high) == pytest.approx(tuple(reference.confidence_interval()))


def test_a_common_swing_of_the_seeds_does_not_hide_a_difference():
    """Seeds that move both alike make an unpaired test blind and leave the paired one sharp."""
    swing = np.array([0.0, 0.1, -0.1, 0.2, -0.2])
    first = 0.7 + swing
    second = first - 0.02 + np.array([1, -1, 2, -2, 0]) * 1e-4
    (paired,) = tests_of({"a": seeded(*first), "b": seeded(*second)})
    (unpaired,) = tests_of({"a": seeded(*first), "b": {seed + 10: value for seed, value in seeded(*second).items()}})

    assert paired.verdict == "beyond noise"
    assert (unpaired.test, unpaired.verdict) == ("Welch t", "within noise")


def test_the_tests_cry_wolf_as_often_as_they_may():
    """Over 150 comparisons of three groups that are alike, at most about one in twenty finds any difference."""
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(150):
        groups = {name: seeded(*generator.normal(0.7, 0.02, 4)) for name in "abc"}
        alarms += any(test.beyond_noise for test in tests_of(groups))

    assert alarms / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_equal_differences_leave_the_verdict_to_the_permutation_test():
    """Without any spread t is infinite after two seeds, which would call everything proven."""
    (same,) = tests_of({"a": seeded(0.5, 0.6, 0.7), "b": seeded(0.5, 0.6, 0.7)})
    (shifted,) = tests_of({"a": seeded(0.5, 0.25), "b": seeded(0.75, 0.5)})

    assert (same.test, same.p, same.verdict) == ("permutation", 1.0, "within noise")
    assert (shifted.test, shifted.p, shifted.verdict) == ("permutation", 0.5, "within noise")


@pytest.mark.parametrize("differences", [[0.1, 0.2, 0.3], [0.1, -0.2, 0.3, 0.05], [0.3, 0.1, 0.2, 0.4, -0.05, 0.2]])
def test_the_permutation_test_counts_all_sign_flips(differences):
    flips = [np.mean(np.multiply(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    extreme = np.mean(np.abs(flips) >= abs(np.mean(differences)) - 1e-12)

    assert sign_flip_p(np.array(differences)) == pytest.approx(extreme)


def test_holm_on_the_example_of_every_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(P_VALUES)
def test_holm_lies_between_nothing_and_bonferroni(p_values):
    """Corrected values are never smaller than the raw ones nor larger than Bonferroni's, and keep the order."""
    corrected = holm(p_values)
    tested = [(p, q) for p, q in zip(p_values, corrected, strict=True) if not math.isnan(p)]

    assert [math.isnan(p) for p in p_values] == [math.isnan(q) for q in corrected]
    assert all(p <= q <= min(1.0, len(tested) * p) + 1e-12 for p, q in tested)
    assert [q for _, q in sorted(tested)] == sorted(q for _, q in tested)


@given(st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12))
def test_the_front_is_what_nobody_dominates(points):
    """By comparing every point with every other; few values, so that ties and twins come up."""

    def dominated(point):
        return any(other[0] <= point[0] and other[1] >= point[1] and other != point for other in points)

    assert pareto_front(points) == [not dominated(point) for point in points]
