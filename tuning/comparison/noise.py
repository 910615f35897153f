"""What is beyond noise: intervals over seeds, tests of pairs of groups, and Pareto fronts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
SIGNIFICANT = 1 - LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with the 95% interval of Student's t; its ends are ``None`` where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTest:
    """Two groups against each other.

    Attributes:
        difference: mean of the first minus mean of the second, over the shared seeds if it is a paired test.
        low: lower end of the 95% interval of the difference; ``None`` where there is none.
        high: upper end.
        num_seeds: shared seeds, or for an unpaired test those of the smaller group.
        test: ``paired t``, ``permutation`` (paired, where the differences have no spread), ``Welch t``, ``none``.
        p: two-sided, of this pair alone; NaN without a test.
        p_permutation: two-sided, of the exact sign-flip permutation test over shared seeds; NaN without them.
        p_holm: ``p`` corrected for all pairs of the comparison.
    """

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    num_seeds: int
    test: str
    p: float
    p_permutation: float
    p_holm: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the difference is significant at 5% over all pairs."""
        return self.p_holm < SIGNIFICANT

    @property
    def verdict(self) -> str:
        """In words."""
        if self.test == "none":
            return "not testable"
        return "beyond noise" if self.beyond_noise else "within noise"


def interval_of(values: Sequence[float]) -> Interval:
    """Return the mean of one value per seed, and its 95% interval by Student's t where there are two or more."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean=mean, low=None, high=None, num_seeds=len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean=mean, low=mean - half, high=mean + half, num_seeds=len(values))


def tests_of(groups: Mapping[str, Mapping[int, float]]) -> list[PairTest]:
    """Test every pair of groups, in their order, and correct by Holm's method over all pairs.

    Args:
        groups: by label, one value per seed.
    """
    labels = list(groups)
    pairs = [(first, second) for place, first in enumerate(labels) for second in labels[place + 1 :]]
    found = [_test(groups[first], groups[second]) for first, second in pairs]
    corrected = holm([p for _, _, p, _ in found])
    return [
        PairTest(
            first=first,
            second=second,
            difference=difference.mean,
            low=difference.low,
            high=difference.high,
            num_seeds=difference.num_seeds,
            test=test,
            p=p,
            p_permutation=p_permutation,
            p_holm=p_holm,
        )
        for (first, second), (difference, test, p, p_permutation), p_holm in zip(pairs, found, corrected, strict=True)
    ]


def _test(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[Interval, str, float, float]:
    """Return the difference, the test's name, its p and that of the permutation test."""
    shared = sorted(first.keys() & second.keys())
    if len(shared) >= 2:
        return _paired(np.array([first[seed] - second[seed] for seed in shared]))
    return _unpaired(np.array(list(first.values())), np.array(list(second.values())))


def _paired(differences: np.ndarray) -> tuple[Interval, str, float, float]:
    from scipy import stats

    p_permutation = sign_flip_p(differences)
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # no spread to measure: Student's t has no say
        mean, num_seeds = float(differences.mean()), len(differences)
        return (
            Interval(mean=mean, low=None, high=None, num_seeds=num_seeds),
            "permutation",
            p_permutation,
            p_permutation,
        )
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return interval_of(list(differences)), "paired t", p, p_permutation


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the share of all sign flips whose mean is as far from 0 as the one seen: exact, and never below 2 / 2^n.

    Beyond 16 differences, 65536 seeded random flips stand for all of them.
    """
    from scipy import stats

    result = stats.permutation_test(
        (differences,),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**16,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _unpaired(first: np.ndarray, second: np.ndarray) -> tuple[Interval, str, float, float]:
    from scipy import stats

    difference, num_seeds = float(first.mean() - second.mean()), min(len(first), len(second))
    untested = Interval(mean=difference, low=None, high=None, num_seeds=num_seeds)
    if num_seeds < 2 or (np.ptp(first) == 0 and np.ptp(second) == 0):
        return untested, "none", math.nan, math.nan
    result = stats.ttest_ind(first, second, equal_var=False)
    ends = result.confidence_interval(LEVEL)
    measured = Interval(mean=difference, low=float(ends.low), high=float(ends.high), num_seeds=num_seeds)
    return measured, "Welch t", float(result.pvalue), math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold for all tests together (Holm 1979); those that are NaN are no tests and stay NaN."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (cost, gain) whether no other point costs no more, gains no less, and is better in one."""
    front: set[tuple[float, float]] = set()
    best = -math.inf
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if gain > best:
            front.add((cost, gain))
            best = gain
    return [point in front for point in points]
