"""What a sweep will do, checked before a machine is asked for."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.platform.errors import ExperimentError, FedloomError
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import Resources, pools_of
from fedloom.platform.preparation import prepare
from fedloom.platform.ray_cluster import actors_per_pool
from fedloom.tuning.schedule import check_changeable
from fedloom.tuning.space import (
    Point,
    bounds_of,
    check_conditions,
    check_scalars,
    experiment_at,
    has_key,
    names_of,
    ordered,
    points_of,
    shown_point,
)
from fedloom.tuning.sweep_file import Sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """A sweep that has been checked.

    Attributes:
        sweep: as its file says.
        document: the experiment's own, before anything is set.
        base: the experiment that all trials share, resolved.
        points: what each trial changes, where that is known beforehand; empty where Optuna chooses.
        experiments: those of the points, or of the ends of every range.
    """

    sweep: Sweep
    document: Mapping[str, Any]
    base: Experiment
    points: Sequence[Point]
    experiments: Sequence[Experiment]


def plan_sweep(sweep: Sweep, document: Mapping[str, Any]) -> SweepPlan:
    """Check a sweep: every key, every value, and that the distinct experiments can be prepared.

    Args:
        sweep: the sweep.
        document: what the file of its experiment holds.

    Raises:
        FedloomError: something cannot work; the message says at which point of the space.
    """
    place = f"sweep {sweep.name}"
    base = experiment_at(document, sweep.set, place=f"{place}, set")
    resolved = base.model_dump(mode="json")
    check_conditions(sweep.space, resolved)
    if sweep.search.kind == "optuna":
        check_scalars(sweep.space)
    if sweep.scheduler.kind == "pbt":
        check_changeable(sweep, base)
    points = [] if sweep.search.kind == "optuna" else points_of(sweep, resolved)
    checked = points or list(_corners(sweep, resolved))
    experiments = [experiment_at(document, {**sweep.set, **point}, place=f"{place}, space") for point in checked]
    seen = set()
    for point, each in zip(checked, experiments, strict=True):
        key = _what_can_fail(each)
        if key not in seen:
            seen.add(key)
            with _naming(f"{place} at {shown_point(point)}"):
                prepare(each)
    return SweepPlan(sweep=sweep, document=document, base=base, points=points, experiments=experiments)


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put a place before what an error says."""
    try:
        yield
    except FedloomError as error:
        raise ExperimentError(f"{place}: {error}") from error


def pools_needed(plan: SweepPlan) -> list[list[Resources]]:
    """Return the distinct sets of pools that trials ask for."""
    return [list(pools) for pools in {tuple(pools_of(experiment)) for experiment in plan.experiments}]


def trials_at_once(demands: Sequence[Mapping[Resources, Resources]], total: Mapping[str, float], actors: int) -> int:
    """Return how many trials a cluster holds, whichever of the demands they have.

    Args:
        demands: what an actor of each pool asks for on this cluster, for every kind of trial.
        total: the cluster's resources.
        actors: client actors in each pool of a trial.

    Raises:
        ExperimentError: not even one fits; the message gives the arithmetic.
    """
    most = []
    for demand in demands:
        actors_per_pool(demand, total, total, exactly=actors)
        needed: dict[str, float] = {}
        for resources in demand.values():
            for name, amount in resources:
                needed[name] = needed.get(name, 0.0) + amount * actors
        most.append(min(int(total[name] / amount + 1e-9) for name, amount in needed.items() if amount > 0))
    return min(most)


def _corners(sweep: Sweep, base: Mapping[str, Any]) -> Iterator[Point]:
    """Yield points that together have every method with every one of its keys at both ends."""
    for names in names_of(sweep.space, base):
        first = {
            key: bounds_of(domain)[0]
            for key, domain in sweep.space.items()
            if key not in names and has_key(key, names, base)
        }
        for key in ordered(first):
            for value in bounds_of(sweep.space[key]):
                yield {**names, **first, key: value}
        if not first:
            yield names


def _what_can_fail(experiment: Experiment) -> str:
    """Return what :func:`~fedloom.platform.preparation.prepare` can refuse, seeds and local training left out."""
    values = experiment.model_dump(mode="json", exclude={"name", "seed", "rounds", "training", "method"})
    return json.dumps([values, experiment.method.name], sort_keys=True)
