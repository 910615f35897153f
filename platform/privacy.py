"""What the noise in the updates is worth: epsilon, by a library's accountant."""

import math
import warnings

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.registry import method_class, method_names
from fedloom.platform.world.controller import build_controller


def check_updates(experiment: Experiment) -> None:
    """Refuse rules and noise that are not sound for the method, the cohort or the controller.

    Raises:
        ExperimentError: it names the key and what would be sound.
    """
    updates, name = experiment.updates, experiment.method.name
    traits = method_class(name).traits
    if updates.rule != "mean" and not traits.aligned:
        raise ExperimentError(
            f"key updates.rule: {updates.rule!r} compares updates coordinate by coordinate, and those of {name!r} do "
            f"not have the same ones. Methods whose updates do: {_able('aligned')}. clip_norm works for all methods."
        )
    if updates.noise_multiplier is None:
        return
    if not traits.additive:
        raise ExperimentError(
            f"key updates.noise_multiplier: noise is sound where the server takes a mean of changes, and {name!r} does "
            f"not. Methods that do: {_able('additive')}."
        )
    _check_cohorts(experiment)
    controller = build_controller(experiment.controller.name, experiment.controller.options)
    if controller.reads_updates:
        raise ExperimentError(
            f"key controller: {experiment.controller.name!r} decides by what clients have sent, which no noise covers. "
            "Take a controller, or an option of it, that does not, or leave updates.noise_multiplier out."
        )


def _check_cohorts(experiment: Experiment) -> None:
    """Refuse cohorts of which some clients are likelier members than epsilon is counted for."""
    if experiment.cohort.sampler != "uniform":
        raise ExperimentError(
            f"key cohort.sampler: epsilon is counted for uniformly sampled cohorts, not {experiment.cohort.sampler!r}. "
            "Set cohort.sampler: uniform, or leave updates.noise_multiplier out."
        )
    population = experiment.population
    if population.availability_trace is not None or any(profile.availability < 1 for profile in population.profiles):
        raise ExperimentError(
            "key population: where some clients are away, the others are sampled more often than epsilon is counted "
            "for. Leave availability and availability_trace out, or updates.noise_multiplier."
        )


def epsilon_after(experiment: Experiment, rounds: int, num_clients: int) -> float:
    """Return epsilon after a number of rounds, for the experiment's ``updates.delta``.

    A client is protected as a whole: whether it ever took part. Cohorts are accounted as Poisson samples with the rate
    of the cohort's places over the population. Real ones have a fixed size, which is the usual approximation and no
    bound: a client that joins then takes the place of another.
    """
    updates = experiment.updates
    if not updates.noise_multiplier or rounds == 0:
        return math.inf if rounds else 0.0
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    rate = min(1.0, experiment.cohort.places / num_clients)
    accountant.history = [(updates.noise_multiplier, rate, rounds)]
    with warnings.catch_warnings():
        # Where the best order lies at an end of its grid, the library says so; the bound holds all the same.
        warnings.filterwarnings("ignore", message="Optimal order", category=UserWarning)
        return float(accountant.get_epsilon(delta=updates.delta))


def _able(trait: str) -> str:
    return ", ".join(name for name in method_names() if getattr(method_class(name).traits, trait))
