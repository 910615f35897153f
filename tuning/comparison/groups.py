"""Runs that differ by nothing but their seed make a group; its label names what sets it apart from the others."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedloom.tuning.comparison.runs import ComparedRun

# What is called, saved or looked at differently is the same experiment all the same.
UNIMPORTANT = ("name", "seed", "save_every", "checkpoint.", "faults.", "evaluation.every", "evaluation.targets")
METHOD = "method.name"
MAX_VALUE_CHARACTERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one experiment, one for each seed, in the order of the seeds."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def seeds(self) -> list[int]:
        """Its seeds, ascending."""
        return [run.seed for run in self.runs]

    @property
    def accuracies(self) -> dict[int, float]:
        """The final accuracy by seed."""
        return {run.seed: run.outcome.accuracy_after for run in self.runs}

    @property
    def personal(self) -> bool:
        """Whether every client has a model of its own, so that no accuracy of a global one speaks for the group."""
        return any(run.personal for run in self.runs)

    @property
    def bytes_up(self) -> float:
        """Mean over seeds."""
        return fmean(run.outcome.bytes_up for run in self.runs)

    @property
    def bytes_down(self) -> float:
        """Mean over seeds."""
        return fmean(run.outcome.bytes_down for run in self.runs)

    @property
    def bytes_total(self) -> float:
        """Mean over seeds."""
        return fmean(run.outcome.bytes_total for run in self.runs)

    @property
    def seconds(self) -> float:
        """Real seconds, mean over seeds."""
        return fmean(run.outcome.seconds for run in self.runs)

    @property
    def sim_seconds(self) -> float | None:
        """Simulated seconds, mean over seeds; ``None`` where a run has no clock."""
        known = [run.outcome.sim_seconds for run in self.runs if run.outcome.sim_seconds is not None]
        return fmean(known) if len(known) == len(self.runs) else None


def grouped(runs: Sequence[ComparedRun]) -> tuple[list[Group], list[str]]:
    """Put runs into groups, in the order in which their first run comes; of equal runs the last one counts.

    Returns the groups, and notes on what was left out.
    """
    cells: dict[tuple[tuple[str, str], ...], dict[int, ComparedRun]] = defaultdict(dict)
    notes = []
    for run in runs:
        cell = cells[tuple(sorted(_important(run.parameters).items()))]
        if run.seed in cell:
            notes.append(
                f"Run {cell[run.seed].run_id[:8]} is left out: {run.run_id[:8]} is the same experiment with the "
                f"same seed {run.seed}, and later."
            )
        cell[run.seed] = run
    labels = labels_of([dict(key) for key in cells])
    groups = [
        Group(label=label, runs=tuple(cell[seed] for seed in sorted(cell)))
        for label, cell in zip(labels, cells.values(), strict=True)
    ]
    return groups, notes


def labels_of(experiments: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a label for each of several different experiments: the method, and what else differs among them.

    An option of a method is named where it differs among the experiments of that method, any other key where it
    differs among all. With one experiment, or where the method is the same everywhere and something else differs, only
    the latter is named.
    """
    varying = _varying(experiments)
    by_method: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for experiment in experiments:
        by_method[experiment[METHOD]].append(experiment)
    options = {name: _varying(same) for name, same in by_method.items()}
    shown = {
        name: [key for key in varying if key != METHOD and (key in own or not key.startswith("method."))]
        for name, own in options.items()
    }
    short = short_names({key for keys in shown.values() for key in keys})
    labels = []
    for experiment in experiments:
        name = experiment[METHOD]
        parts = [f"{short[key]}={_clipped(experiment[key])}" for key in shown[name] if key in experiment]
        labels.append(" ".join([name] * (METHOD in varying or not parts) + parts))
    return labels


def _important(parameters: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in parameters.items()
        if not any(key == name or (name.endswith(".") and key.startswith(name)) for name in UNIMPORTANT)
    }


def _varying(experiments: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that differ, or are not in all, in the order in which they come."""
    keys = dict.fromkeys(key for experiment in experiments for key in experiment)
    return [key for key in keys if len({experiment.get(key) for experiment in experiments}) > 1]


def short_names(keys: set[str]) -> dict[str, str]:
    """Shorten dotted keys to their last part, or to as many as tell them apart."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short[key] = next(
            end
            for end in ends
            if end == key or not any(other != key and f".{other}".endswith(f".{end}") for other in keys)
        )
    return short


def _clipped(value: str) -> str:
    """Shorten a long value; digits of its hash keep different ones apart."""
    if len(value) <= MAX_VALUE_CHARACTERS:
        return value
    digits = hashlib.sha256(value.encode()).hexdigest()[:6]
    return f"{value[: MAX_VALUE_CHARACTERS - 8]}…#{digits}"
