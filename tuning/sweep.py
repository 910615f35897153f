"""A sweep: trials under Ray Tune, each an ordinary run on record, all under one parent run."""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import DONE

from fedloom.platform.ray_cluster import affordable, renamed, start_ray
from fedloom.platform.tracked_run import flatten
from fedloom.platform.tracking import TrackedRun, Tracking
from fedloom.platform.tracking_read import SWEEP_TAG
from fedloom.tuning.schedule import scheduler_of, searcher_of
from fedloom.tuning.space import Point, shown_point
from fedloom.tuning.sweep_file import Sweep
from fedloom.tuning.sweep_folder import FILES, facts_of, folder_of_sweep
from fedloom.tuning.sweep_plan import SweepPlan, pools_needed, trials_at_once
from fedloom.tuning.trial import ERROR, POINT, Setting, Trial, demand_of, point_of

ID_TAG = "fedloom.sweep_id"  # of the parent run alone
SNAPSHOT_S = 2  # seconds between two snapshots of Tune's state; what it has forgotten, the trials' own runs still know


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        point: what it had of its own.
        run_id: MLflow's; empty if it never got so far.
        round: the last one that it finished.
        rounds: those that it was to play.
        metrics: the newest of each.
        error: what ended it, if anything did.
    """

    point: Point
    run_id: str
    round: int
    rounds: int
    metrics: Mapping[str, float]
    error: str

    @property
    def outcome(self) -> str:
        """``finished``, ``stopped`` before its last round by a scheduler, or ``failed``."""
        return "failed" if self.error else "finished" if self.round == self.rounds else "stopped"


def run_sweep(
    plan: SweepPlan, tracking: Tracking, *, address: str | None = None, callbacks: Sequence[tune.Callback] = ()
) -> tuple[str, list[TrialResult]]:
    """Play the trials of a sweep, or what is left of them.

    Args:
        plan: the sweep; its folder is there.
        tracking: where its runs are recorded.
        address: the Ray cluster to join; by default an embedded one is started.
        callbacks: Ray Tune's, told of every trial; they are pickled into its state.

    Returns:
        The parent run's id, and the trials that have ended.

    Raises:
        ExperimentError: the cluster cannot hold a single trial.
        KeyboardInterrupt: Ctrl-C; the sweep can go on.
    """
    sweep = plan.sweep
    tags = {SWEEP_TAG: sweep.name, ID_TAG: facts_of(sweep.name)["id"]}
    found = tracking.find(tags)
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_GLOBAL_CHECKPOINT_S": str(SNAPSHOT_S)}
    # The runs are on record already, and the command shows them.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed has no objective
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # likewise
    started = start_ray(address)
    try:
        total = renamed(ray.cluster_resources())
        pools = [{pool: affordable(pool) for pool in each} for each in pools_needed(plan)]
        fitting = trials_at_once(pools, total, sweep.trials.actors)
        with tracking.parent(sweep.name, tags=tags, resume=None if found is None else found[0]) as parent:
            if found is None:
                _describe(parent, plan)
            results = _fit(plan, tracking, parent.run_id, min(fitting, sweep.trials.concurrent or fitting), callbacks)
            for result in results:
                if result.outcome == "stopped":
                    tracking.stopped(result.run_id, f"after round {result.round} of {result.rounds}")
            _register_best(plan, tracking, parent, results)
        return parent.run_id, results
    finally:
        if started:
            ray.shutdown()


def _describe(parent: TrackedRun, plan: SweepPlan) -> None:
    parent.values(flatten(plan.sweep.model_dump(mode="json")))
    for name in FILES:
        parent.text(name, (folder_of_sweep(plan.sweep.name) / name).read_text(encoding="utf-8"))


def best_first(sweep: Sweep, results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials by the first objective; those without it come last."""
    first = sweep.objectives[0]
    sign = -1 if first.mode == "max" else 1
    return sorted(results, key=lambda result: sign * result.metrics.get(first.metric, sign * math.inf))


def _register_best(plan: SweepPlan, tracking: Tracking, parent: TrackedRun, results: Sequence[TrialResult]) -> None:
    """Enter the adapter of the best trial that has reached its last round into the registry, with its lineage."""
    finished = [result for result in best_first(plan.sweep, results) if result.outcome == "finished"]
    if plan.sweep.register_as is None or not finished:
        return
    best = finished[0]
    lineage = {
        SWEEP_TAG: plan.sweep.name,
        "fedloom.parent_run": parent.run_id,
        "fedloom.point": shown_point(best.point),
        "fedloom.base_model": plan.base.model.name,
    }
    version = tracking.finished(best.run_id).register(plan.sweep.register_as, "adapters/final", lineage)
    parent.tag("fedloom.registered", f"{plan.sweep.register_as} version {version} from run {best.run_id}")


def _fit(
    plan: SweepPlan, tracking: Tracking, parent_run_id: str, concurrent: int, callbacks: Sequence[tune.Callback]
) -> list[TrialResult]:
    sweep = plan.sweep
    setting = Setting(
        sweep=sweep.name,
        document=plan.document,
        shared=sweep.set,
        objectives=tuple(objective.metric for objective in sweep.objectives),
        folder=Path.cwd(),
        tracking_uri=tracking.uri,
        parent_run_id=parent_run_id,
        actors=sweep.trials.actors,
        population=sweep.scheduler.kind == "pbt",
    )
    trainable = tune.with_resources(tune.with_parameters(Trial, setting=setting), _group_for(setting))
    state = folder_of_sweep(sweep.name).absolute() / "tune"
    if tune.Tuner.can_restore(str(state)):
        tuner = tune.Tuner.restore(
            str(state), trainable=trainable, resume_unfinished=True, resume_errored=True, param_space=_space_of(plan)
        )
    else:
        tuner = _tuner(plan, trainable, state, concurrent, callbacks)
    grid = tuner.fit()
    trials = grid._experiment_analysis.trials
    if was_cut(trials, len(plan.points) or sweep.search.trials or 1):
        raise KeyboardInterrupt
    return [result_of(trial) for trial in trials]


def was_cut(trials: Sequence[Any], planned: int) -> bool:
    """Whether Ctrl-C has ended a sweep: Tune then returns as ever, with trials that it calls terminated."""
    ended = [bool(trial.status == "ERROR" or (trial.last_result or {}).get(DONE)) for trial in trials]
    return sum(ended) < planned


def _tuner(
    plan: SweepPlan, trainable: Any, state: Path, concurrent: int, callbacks: Sequence[tune.Callback]
) -> tune.Tuner:
    sweep = plan.sweep
    rounds = max(experiment.rounds for experiment in plan.experiments)
    return tune.Tuner(
        trainable,
        param_space=_space_of(plan),
        tune_config=tune.TuneConfig(
            search_alg=searcher_of(sweep, plan.base),
            scheduler=scheduler_of(sweep, point=POINT, rounds=rounds),
            num_samples=(sweep.search.trials or 1) if sweep.search.kind == "optuna" else 1,
            # A population is compared with those that wait: they take turns where not all have room.
            max_concurrent_trials=None if sweep.scheduler.kind == "pbt" else concurrent,
            reuse_actors=sweep.trials.warm,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(state.parent),
            failure_config=tune.FailureConfig(max_failures=sweep.trials.retries),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )


def _space_of(plan: SweepPlan) -> dict[str, Any]:
    return {POINT: tune.grid_search(list(plan.points))} if plan.points else {}


def _group_for(setting: Setting) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """Return what asks for a trial's resources: all at once, so that no two trials wait for each other's rest."""

    def group(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory(demand_of(setting.experiment_at(point_of(config)), setting.actors))

    return group


def result_of(trial: Any) -> TrialResult:
    """Return how one of Ray Tune's trials has ended."""
    last = trial.last_result or {}
    metrics = {name: value for name, value in last.items() if isinstance(value, float)}
    return TrialResult(
        point=point_of(trial.config),
        run_id=last.get("run_id", ""),
        round=last.get("round", 0),
        rounds=last.get("rounds", 0),
        metrics=metrics,
        error=_reason(trial) if trial.status == "ERROR" else last.get(ERROR, ""),
    )


def _reason(trial: Any) -> str:
    """Return what ended a trial, in one line, without the name of our own class of error."""
    written = Path(trial.error_file) if trial.error_file else None
    lines = written.read_text(encoding="utf-8").strip().splitlines() if written and written.exists() else ["failed"]
    return re.sub(r"^fedloom\.\S+: ", "", lines[-1])
