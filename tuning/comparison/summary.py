"""A comparison as values: a row for each group, tests of pairs, fronts, and what they come to in sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from fedloom.methods.algebra import energy_rank
from fedloom.platform.evaluation import spread
from fedloom.tuning.comparison.groups import Group, grouped
from fedloom.tuning.comparison.noise import LEVEL, Interval, PairTest, interval_of, pareto_front, tests_of
from fedloom.tuning.comparison.reference import Reference
from fedloom.tuning.comparison.runs import ComparedRun

ENERGY = 0.9  # of the squared singular values
COSTS = {"bytes": "bytes", "sim_seconds": "simulated time", "seconds": "real time"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """Accuracy over clients' own examples, each figure a mean over seeds; ``std`` is the population's."""

    num_clients: int
    mean: float
    std: float
    worst_decile: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """The final global adapter, each figure a mean over modules and seeds.

    Attributes:
        num_modules: modules of one adapter.
        rank: singular values above rounding.
        stable_rank: sum of squares over the largest square.
        energy_rank: how many hold 90% of the sum of squares.
        norm: Frobenius norm of scale * B A.
    """

    num_modules: int
    rank: float
    stable_rank: float
    energy_rank: float
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One group's figures; ``fronts`` names the costs against whose Pareto front it stands on."""

    group: Group
    accuracy: Interval
    loss: Interval
    bytes_up: float
    bytes_down: float
    fronts: tuple[str, ...]
    fairness: Fairness | None
    spectrum: Spectrum | None
    published: tuple[Reference, ...]

    @property
    def label(self) -> str:
        """The group's."""
        return self.group.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All there is to show; ``rows`` begin with the highest mean accuracy."""

    rows: tuple[Row, ...]
    tests: tuple[PairTest, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[ComparedRun]:
        """Every run that counts."""
        return [run for row in self.rows for run in row.group.runs]

    @property
    def tests_of_best(self) -> list[PairTest]:
        """The pairs with the first row, in the order of the rows."""
        return [test for test in self.tests if test.first == self.rows[0].label]

    @property
    def has_clock(self) -> bool:
        """Whether there is simulated time for every group."""
        return all(row.group.sim_seconds is not None for row in self.rows)


def compare(runs: Sequence[ComparedRun], published: Sequence[Reference] = (), notes: Sequence[str] = ()) -> Comparison:
    """Group runs and compare the groups.

    Args:
        runs: at least one.
        published: numbers of papers, shown beside the groups whose labels they match.
        notes: on what was left out before.
    """
    groups, doubled = grouped(runs)
    groups.sort(key=lambda group: -fmean(group.accuracies.values()))
    fronts = fronts_of(groups)
    rows = tuple(_row(group, fronts, published) for group in groups)
    tests = tuple(tests_of({group.label: group.accuracies for group in groups}))
    return Comparison(
        rows=rows,
        tests=tests,
        findings=tuple(_findings(rows, tests)),
        notes=(*notes, *doubled, *_warnings(groups), *_unmatched(groups, published)),
    )


def fronts_of(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return by cost the labels on the front of mean accuracy against it; left out where not all have it."""
    costs: dict[str, list[float | None]] = {
        "bytes": [group.bytes_total for group in groups],
        "sim_seconds": [group.sim_seconds for group in groups],
        "seconds": [group.seconds for group in groups],
    }
    gains = [fmean(group.accuracies.values()) for group in groups]
    fronts = {}
    for name, values in costs.items():
        known = [value for value in values if value is not None]
        if len(known) == len(groups):
            on_front = pareto_front(list(zip(known, gains, strict=True)))
            fronts[name] = [group.label for group, on in zip(groups, on_front, strict=True) if on]
    return fronts


def _row(group: Group, fronts: Mapping[str, Sequence[str]], published: Sequence[Reference]) -> Row:
    return Row(
        group=group,
        accuracy=interval_of(list(group.accuracies.values())),
        loss=interval_of([run.outcome.loss_after for run in group.runs]),
        bytes_up=fmean(run.outcome.bytes_up for run in group.runs),
        bytes_down=fmean(run.outcome.bytes_down for run in group.runs),
        fronts=tuple(name for name, labels in fronts.items() if group.label in labels),
        fairness=_fairness(group),
        spectrum=_spectrum(group),
        published=tuple(entry for entry in published if entry.fits(group)),
    )


def _fairness(group: Group) -> Fairness | None:
    scored = [spread(run.clients) for run in group.runs if run.clients]
    if not scored:
        return None
    return Fairness(
        num_clients=min(len(run.clients) for run in group.runs if run.clients),
        mean=fmean(each["clients/accuracy/mean"] for each in scored),
        std=fmean(each["clients/accuracy/std"] for each in scored),
        worst_decile=fmean(each["clients/accuracy/worst_decile"] for each in scored),
    )


def _spectrum(group: Group) -> Spectrum | None:
    spectra = [np.array(sigma) for run in group.runs for sigma in run.spectra.values()]
    if not spectra:
        return None
    squares = [float((sigma**2).sum()) for sigma in spectra]
    stable = [
        energy / float(sigma[0] ** 2) if len(sigma) else 0.0 for energy, sigma in zip(squares, spectra, strict=True)
    ]
    return Spectrum(
        num_modules=max(len(run.spectra) for run in group.runs),
        rank=fmean(len(sigma) for sigma in spectra),
        stable_rank=fmean(stable),
        energy_rank=fmean(energy_rank(torch.from_numpy(sigma), ENERGY) for sigma in spectra),
        norm=fmean(energy**0.5 for energy in squares),
    )


def _findings(rows: Sequence[Row], tests: Sequence[PairTest]) -> list[str]:
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


def _warnings(groups: Sequence[Group]) -> list[str]:
    """Say what makes groups hard to compare."""
    notes = []
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


def _unmatched(groups: Sequence[Group], published: Sequence[Reference]) -> list[str]:
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


def p_in_words(p: float) -> str:
    """Return a p-value with three digits; ``-`` for NaN, which is no test."""
    if math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
