"""Who chooses the points of a sweep, and who stops or changes its trials: Optuna's and Ray Tune's own."""

import functools
import random
import re
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.registry import method_class
from fedloom.platform.seeds import seed_for
from fedloom.tuning.space import Suggest
from fedloom.tuning.sweep_file import Range, Space, Sweep

RATIO = re.compile(r"population\.profiles\.\d+\.ratio")


class Population(PopulationBasedTraining):
    """Ray Tune's population-based training, whose choices repeat.

    All trials wait for one another at every interval, so that who is compared with whom does not depend on who is
    quicker, and the draws of that moment follow from the seed and the time.
    """

    _next_perturbation_sync: float  # Ray Tune's

    def __init__(self, *, seed: int, **options: Any) -> None:
        """``options`` are Ray Tune's."""
        super().__init__(synch=True, log_config=False, **options)  # runs say what they have taken over
        self._seed = seed

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide with generators of our own in the place of Python's and NumPy's, from which Ray Tune draws."""
        states = random.getstate(), np.random.get_state()
        seed = seed_for(self._seed, "population", str(result[self._time_attr]))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            decision = str(super().on_trial_result(tune_controller, trial, result))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        self._move_on(tune_controller)
        return decision

    def _move_on(self, tune_controller: Any) -> None:
        """Set the next moment of comparison later where nobody would be let run before it.

        Ray Tune starts its clock anew when a sweep is taken up again, and then puts it to where all trials are already.
        """
        reached = [self._trial_state[trial].last_train_time for trial in tune_controller.get_live_trials()]
        if reached and min(reached) >= self._next_perturbation_sync:
            self._next_perturbation_sync = max(reached) + self._perturbation_interval


def scheduler_of(sweep: Sweep, *, point: str, rounds: int) -> TrialScheduler | None:
    """Return Ray Tune's scheduler for a sweep, or ``None``.

    Args:
        sweep: its section ``scheduler`` and its first objective decide.
        point: the key under which a trial's configuration holds its point.
        rounds: of the longest trial.
    """
    section, objective = sweep.scheduler, sweep.objectives[0]
    judged: dict[str, Any] = {"time_attr": section.time, "metric": objective.metric, "mode": objective.mode}
    if section.kind == "asha":
        # On simulated time nobody knows the end beforehand: there are as many rungs as trials reach.
        longest = rounds if section.time == "round" else section.grace * section.reduction_factor**20
        return AsyncHyperBandScheduler(
            **judged, grace_period=section.grace, reduction_factor=section.reduction_factor, max_t=longest
        )
    if section.kind == "median":
        return MedianStoppingRule(**judged, grace_period=section.grace)
    if section.kind == "pbt":
        return Population(
            seed=sweep.search.seed,
            **judged,
            perturbation_interval=section.interval,
            hyperparam_mutations={point: _mutations(sweep)},
            custom_explore_fn=functools.partial(_within, point=point, space=sweep.space),
        )
    return None


def searcher_of(sweep: Sweep, base: Experiment) -> Searcher | None:
    """Return Optuna's search over a sweep's space, or ``None`` where the points are known beforehand."""
    if sweep.search.kind != "optuna":
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics = [objective.metric for objective in sweep.objectives]
    modes = [objective.mode for objective in sweep.objectives]
    return OptunaSearch(
        space=Suggest(sweep.space, base.model_dump(mode="json")),
        metric=metrics if len(metrics) > 1 else metrics[0],
        mode=modes if len(modes) > 1 else modes[0],
        sampler=optuna.samplers.TPESampler(seed=sweep.search.seed),
    )


def check_changeable(sweep: Sweep, base: Experiment) -> None:
    """Refuse keys that cannot change in the middle of a run.

    Raises:
        ExperimentError: it names the key and those that can.
    """
    changeable = [f"method.{name}" for name in method_class(base.method.name).traits.changeable]
    for key in sweep.space:
        if not (key in changeable or key.startswith("training.") or RATIO.fullmatch(key)):
            raise ExperimentError(
                f"sweep {sweep.name}, space.{key}: scheduler.kind 'pbt' changes it in the middle of a run, and that "
                f"cannot be. With method {base.method.name!r} it can be: "
                f"{', '.join([*changeable, 'training.*', 'population.profiles.N.ratio'])}."
            )


def _within(config: dict[str, Any], *, point: str, space: Space) -> dict[str, Any]:
    """Put values that a change by a fifth has carried out of their range back to its end."""
    for key, domain in space.items():
        if isinstance(domain, Range):
            value = min(max(config[point][key], domain.low), domain.high)
            config[point][key] = int(value) if domain.integer else value
    return config


def _mutations(sweep: Sweep) -> dict[str, Any]:
    mutations: dict[str, Any] = {}
    for key, domain in sweep.space.items():
        if not isinstance(domain, Range):
            mutations[key] = list(domain)
        elif domain.integer:
            draw = tune.lograndint if domain.log else tune.randint
            mutations[key] = draw(int(domain.low), int(domain.high) + 1)
        else:
            mutations[key] = (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    return mutations
