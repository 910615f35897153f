"""What the noise in the updates is worth: epsilon, by a library's accountant."""

import math
import warnings

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.registry import method_class, method_names


def check_updates(experiment: Experiment) -> None:
    """Refuse rules and noise that are not sound for the method or the cohort.

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
    if experiment.cohort.sampler != "uniform":
        raise ExperimentError(
            f"key cohort.sampler: epsilon is counted for uniformly sampled cohorts, not {experiment.cohort.sampler!r}. "
            "Set cohort.sampler: uniform, or leave updates.noise_multiplier out."
        )


def epsilon_after(experiment: Experiment, rounds: int, num_clients: int) -> float:
    """Return epsilon after a number of rounds, for the experiment's ``updates.delta``.

    A client is protected as a whole: whether it ever took part. Cohorts are accounted as Poisson samples with the rate
    of the cohort's size over the population, which those of a fixed size come close to.
    """
    updates = experiment.updates
    if not updates.noise_multiplier or rounds == 0:
        return math.inf if rounds else 0.0
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    wanted = math.ceil(experiment.cohort.size * experiment.cohort.over_selection)
    accountant.history = [(updates.noise_multiplier, min(1.0, wanted / num_clients), rounds)]
    with warnings.catch_warnings():
        # Where the best order lies at an end of its grid, the library says so; the bound holds all the same.
        warnings.filterwarnings("ignore", message="Optimal order", category=UserWarning)
        return float(accountant.get_epsilon(delta=updates.delta))


def _able(trait: str) -> str:
    return ", ".join(name for name in method_names() if getattr(method_class(name).traits, trait))
