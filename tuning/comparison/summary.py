"""A comparison as values: a row for each group, tests of pairs, fronts, and what they come to in sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from fedloom.methods.algebra import energy_rank
from fedloom.platform.evaluation import spread
from fedloom.tuning.comparison.findings import findings, unmatched, warnings
from fedloom.tuning.comparison.groups import Group, grouped
from fedloom.tuning.comparison.noise import Interval, PairTest, interval_of, pareto_front, tests_of
from fedloom.tuning.comparison.reference import Reference
from fedloom.tuning.comparison.runs import ComparedRun

ENERGY = 0.9  # of the squared singular values


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
    fronts: tuple[str, ...]
    fairness: Fairness | None
    spectrum: Spectrum | None
    published: tuple[Reference, ...]

    @property
    def label(self) -> str:
        """The group's."""
        return self.group.label


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalRow:
    """A group in which every client has a model of its own, by the accuracy of these models.

    It is that on a client's own examples, and says nothing of a global model: the two are never compared.
    """

    group: Group
    accuracy: Interval
    std: float
    worst_decile: float

    @property
    def label(self) -> str:
        """The group's."""
        return self.group.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All there is to show; ``rows`` and ``personal`` begin with the highest mean accuracy, and either may be empty."""

    rows: tuple[Row, ...]
    personal: tuple[PersonalRow, ...]
    tests: tuple[PairTest, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

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
    every, doubled = grouped(runs)
    groups = [group for group in every if not group.personal]
    groups.sort(key=lambda group: -fmean(group.accuracies.values()))
    personal = [_personal_row(group) for group in every if group.personal]
    fronts = fronts_of(groups)
    rows = tuple(_row(group, fronts, published) for group in groups)
    tests = tuple(tests_of({group.label: group.accuracies for group in groups}))
    return Comparison(
        rows=rows,
        personal=tuple(sorted(personal, key=lambda row: -row.accuracy.mean)),
        tests=tests,
        findings=tuple(findings(rows, tests)),
        notes=(*notes, *doubled, *warnings(every), *unmatched(every, published)),
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
        fronts=tuple(name for name, labels in fronts.items() if group.label in labels),
        fairness=_fairness(group),
        spectrum=_spectrum(group),
        published=tuple(entry for entry in published if entry.fits(group)),
    )


def _personal_row(group: Group) -> PersonalRow:
    scored = [run.personal for run in group.runs]
    return PersonalRow(
        group=group,
        accuracy=interval_of([each["mean"] for each in scored]),
        std=fmean(each["std"] for each in scored),
        worst_decile=fmean(each["worst_decile"] for each in scored),
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
