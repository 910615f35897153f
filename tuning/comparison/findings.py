"""What a comparison comes to, in sentences."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.tuning.comparison.groups import Group
from fedloom.tuning.comparison.noise import LEVEL, Interval, PairTest
from fedloom.tuning.comparison.reference import Reference

if TYPE_CHECKING:  # it makes the rows, and calls what is here for their sentences
    from fedloom.tuning.comparison.summary import Row

COSTS = {"bytes": "bytes", "sim_seconds": "simulated time", "seconds": "real time"}


def findings(rows: Sequence["Row"], tests: Sequence[PairTest]) -> list[str]:
    """Say which group is best, what is beyond noise, and who stands on the fronts.

    Args:
        rows: the groups with a global model, the highest mean accuracy first.
        tests: of all pairs of them.
    """
    if not rows:
        return []
    best = rows[0]
    sentences = [f"Highest mean accuracy: {best.label}, {in_words(best.accuracy)}."]
    against = [test for test in tests if test.first == best.label]
    for verdict, words in (
        ("beyond noise", "Below it beyond noise"),
        ("within noise", "Within noise of it"),
        ("not testable", "No test possible against it (one seed, or no spread over seeds that differ)"),
    ):
        named = [f"{test.second} ({points(-test.difference)})" for test in against if test.verdict == verdict]
        if named:
            sentences.append(f"{words}: {', '.join(named)}.")
    for cost, words in COSTS.items():
        named = [row.label for row in rows if cost in row.fronts]
        if len(rows) > 1 and named:
            sentences.append(f"On the Pareto front of mean accuracy against {words}: {', '.join(named)}.")
    return sentences


def warnings(groups: Sequence[Group]) -> list[str]:
    """Say what makes groups hard to compare."""
    notes = []
    personal = [group.label for group in groups if group.personal]
    if personal:
        notes.append(
            "Every client has a model of its own, whose accuracy is not to be compared with that of a global one: "
            f"{', '.join(personal)}."
        )
    if any(len(group.runs) == 1 for group in groups):
        alone = [group.label for group in groups if len(group.runs) == 1]
        notes.append(f"One seed only, so that no interval can be had: {', '.join(alone)}.")
    by_seed: dict[int, set[str]] = {}
    for group in groups:
        for run in group.runs:
            by_seed.setdefault(run.seed, set()).add(run.fingerprint)
    differing = sorted(seed for seed, fingerprints in by_seed.items() if len(fingerprints) > 1)
    if differing:
        notes.append(f"Runs of one seed do not have the same data (seeds {', '.join(map(str, differing))}).")
    versions = {run.code_version for group in groups for run in group.runs}
    if len(versions) > 1:
        notes.append(f"The runs were made by {len(versions)} versions of the code.")
    return notes


def unmatched(groups: Sequence[Group], published: Sequence[Reference]) -> list[str]:
    """Say which published numbers have no group to stand beside."""
    fitting = {entry.group for entry in published if any(entry.fits(group) for group in groups)}
    unused = dict.fromkeys(entry.group for entry in published if entry.group not in fitting)
    return [f"No group matches what is published as {name!r}." for name in unused]


def in_words(interval: Interval) -> str:
    """Return an accuracy with its interval, e.g. ``81.2% (95% interval 79.9% to 82.5% over 5 seeds)``."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.1%} (one seed, no interval)"
    return (
        f"{interval.mean:.1%} ({LEVEL:.0%} interval {interval.low:.1%} to {interval.high:.1%} "
        f"over {interval.num_seeds} seeds)"
    )


def points(difference: float) -> str:
    """Return a difference of accuracies in percentage points, e.g. ``+2.1 points``."""
    return f"{100 * difference:+.1f} points"


def megabytes(amount: float) -> str:
    """Return bytes in megabytes with three digits, without the unit."""
    return f"{amount / 1e6:.3g}"


def p_in_words(p: float) -> str:
    """Return a p-value with three digits; ``-`` for NaN, which is no test."""
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
