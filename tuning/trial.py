"""A trial: an ordinary experiment on record, played round by round under Ray Tune."""

import contextlib
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.result import DONE

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.errors import ExperimentError, FedloomError, ServerLostError, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import Resources, groups_of, pools_of
from fedloom.platform.preparation import Prepared, data_key, gpu_needs, prepare
from fedloom.platform.ray_cluster import GIB, affordable
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.recording import recorded_run
from fedloom.platform.rounds import Round
from fedloom.platform.run_folder import folder_of
from fedloom.platform.tracking import Tracking, TrackingError
from fedloom.platform.tracking_read import PARENT_TAG, SWEEP_TAG
from fedloom.tuning.space import Point, experiment_at, shown_point
from fedloom.tuning.trial_files import Origin, copy_checkpoint, only_one, rounds_on_disk

TRIAL_TAG = "fedloom.trial"
TAKEN_OVER_TAG = "fedloom.taken_over"  # with the round after it
POINT = "point"  # where a trial's configuration holds its point
ERROR = "error"  # where its last result says what ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all trials of a sweep share.

    Attributes:
        sweep: its name.
        document: the experiment that the sweep names, before anything is set.
        shared: what is set for all trials.
        objectives: the metrics that every trial must have.
        folder: the working directory, the same on every node.
        tracking_uri: where runs are recorded.
        parent_run_id: the sweep's own run.
        actors: client actors in each pool.
        population: whether trials take over the state of better ones, and change their options.
    """

    sweep: str
    document: Mapping[str, Any]
    shared: Point
    objectives: tuple[str, ...]
    folder: Path
    tracking_uri: str
    parent_run_id: str
    actors: int
    population: bool = False

    def experiment_at(self, point: Point) -> Experiment:
        """Return a trial's experiment."""
        return experiment_at(self.document, {**self.shared, **point}, place=f"sweep {self.sweep}")


def point_of(config: Mapping[str, Any]) -> Point:
    """Return the point of a trial's configuration: under a key of its own, or, from Optuna, the whole of it."""
    point: Point = config.get(POINT, config)
    return point


def demand_of(experiment: Experiment, actors: int) -> list[dict[str, float]]:
    """Return the bundles of a trial's placement group, under Ray's names: its driver and server, then its clients."""
    return [{}, *(_bundle(affordable(pool)) for pool in pools_of(experiment) for _ in range(actors))]


def _bundle(pool: Resources) -> dict[str, float]:
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory_gib": "memory"}
    return {
        names.get(name, name): float(int(amount * GIB)) if name == "memory_gib" else amount
        for name, amount in pool
        if amount > 0
    }


class Machines:
    """The client actors of one slot: started for the first trial, handed on to those with the same base model."""

    def __init__(self, actors: int) -> None:
        """Start nothing yet."""
        self._actors = actors
        self._executor: RayExecutor | None = None
        self._serving: tuple[Any, ...] = ()
        self._data_key = ""
        self._data: FederatedData | None = None

    def prepared(self, experiment: Experiment) -> Prepared:
        """Prepare an experiment; data that the trial before it had are not read again."""
        same = self._data_key == data_key(experiment)
        prepared = prepare(experiment, self._data if same else None)
        self._data_key, self._data = data_key(experiment), prepared.data
        return prepared

    def executor_for(self, prepared: Prepared) -> RayExecutor:
        """Return the executor, a new one where the base model or the pools are others."""
        pools = pools_of(prepared.experiment)
        groups = groups_of(prepared.experiment)
        serving = (prepared.spec, pools, groups)
        if self._executor is None or self._serving != serving:
            self.close()
            self._executor = RayExecutor(
                prepared.spec, prepared.data, pools, groups, actors=self._actors, gpu_needs=gpu_needs(prepared)
            )
            self._serving = serving
        else:
            self._executor.use(prepared.data)
        return self._executor

    def close(self) -> None:
        """Give the actors back."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None


class Trial(tune.Trainable):  # type: ignore[misc, unused-ignore]
    """One slot of a sweep, which plays one trial after another; a step is a round."""

    def setup(self, config: dict[str, Any], setting: Setting) -> None:
        """Open the first trial."""
        setting.folder.mkdir(parents=True, exist_ok=True)
        os.chdir(setting.folder)  # relative paths mean what they mean to `fedloom run`
        self._setting = setting
        self._played: Generator[Round]
        self._machines = Machines(setting.actors)
        self._open(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Leave a trial as it is and open the next one on the same actors."""
        self._played.close()
        self._open(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Play a round, the first one with the untrained model before it.

        The last one is reported once everything of the run is on record. An error of ours ends the trial for good,
        since the same seeds would end in it again; whatever else goes wrong is Ray Tune's to try again.
        """
        try:
            done = self._next_round()
        except (ServerLostError, TrackingError):
            raise
        except FedloomError as error:
            return self._reported() | {ERROR: " ".join(str(error).split()), DONE: True}
        return self._reported() | {DONE: done.number == self._rounds}

    def _next_round(self) -> Round:
        done = next(self._played)
        if done.number == 0:
            self._seen |= done.metrics
            done = next(self._played)
        if done.number == self._rounds:
            next(self._played, None)
        self._round = done.number
        self._seen |= done.metrics  # a round without an evaluation is judged by the one before
        for metric in self._setting.objectives:
            if metric not in self._seen:
                raise ExperimentError(
                    f"objectives: the runs have no metric {metric!r}.{nearest(metric, self._seen)} "
                    f"Known: {', '.join(sorted(self._seen))}."
                )
        return done

    def _reported(self) -> dict[str, Any]:
        return {**self._seen, "round": self._round, "rounds": self._rounds, "run_id": self._run_id}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the run's last checkpoint, for another trial to go on from."""
        copy_checkpoint(folder_of(self._run_id), Path(checkpoint_dir))
        Origin(run_id=self._run_id, round=self._round).write(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Take over the checkpoint of another trial; the next step goes on after it."""
        if not self._setting.population:
            return
        tracking = Tracking(self._setting.tracking_uri)
        found = self._found(tracking)
        if found is None:
            return
        copy_checkpoint(Path(checkpoint), folder_of(found[0]))
        origin = Origin.read(Path(checkpoint))
        if origin.run_id != found[0]:
            tag = f"run {origin.run_id}; goes on with {shown_point(self._point)}"
            tracking.finished(found[0]).tag(f"{TAKEN_OVER_TAG}.{origin.round}", tag)

    def cleanup(self) -> None:
        """Leave the trial and give the actors back."""
        with contextlib.suppress(AttributeError):  # what failed in setup
            self._played.close()
        self._machines.close()

    def _open(self, config: dict[str, Any]) -> None:
        setting = self._setting
        self._point = point_of(config)
        experiment = setting.experiment_at(self._point)
        # Trials of a population change their options and stay who they are.
        self._key = self.trial_id if setting.population else experiment.hash
        self._rounds, self._round, self._run_id = experiment.rounds, 0, ""
        self._seen: dict[str, float] = {}
        self._played = self._rounds_of(experiment)

    def _rounds_of(self, experiment: Experiment) -> Generator[Round]:
        """Play the trial, or what is left of it: its run is known by its tags, so that nothing runs twice.

        Optuna may ask for one point twice at once: the second then waits, and finds it played.
        """
        with only_one(self._setting.sweep, self._key):
            tracking = Tracking(self._setting.tracking_uri)
            found = self._found(tracking)
            finished = rounds_on_disk(found[0]) if found is not None and found[1] == "FINISHED" else []
            if found is not None and len(finished) == experiment.rounds + 1:
                self._run_id = found[0]
                yield from finished
            else:
                yield from self._recorded(experiment, tracking, None if found is None else found[0])

    def _recorded(self, experiment: Experiment, tracking: Tracking, resume: str | None) -> Generator[Round]:
        prepared = self._machines.prepared(experiment)
        with recorded_run(
            prepared,
            self._machines.executor_for(prepared),
            tracking,
            tags={SWEEP_TAG: self._setting.sweep, TRIAL_TAG: self._key},
            parent_run_id=self._setting.parent_run_id,
            resume=resume,
        ) as recorded:
            self._run_id = recorded.run_id
            for done in recorded.rounds():
                if done.number == experiment.rounds or not (self._setting.population and recorded.restored(done)):
                    yield done

    def _found(self, tracking: Tracking) -> tuple[str, str] | None:
        """Return the id and the status of this trial's run, if it has been started."""
        return tracking.find({PARENT_TAG: self._setting.parent_run_id, TRIAL_TAG: self._key})
