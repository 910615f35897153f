"""A run on record: the driver's rounds, each logged and on disk before the caller sees it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run_through_loss
from fedloom.platform.evaluation import clients_csv
from fedloom.platform.executor import Executor
from fedloom.platform.experiment import Experiment
from fedloom.platform.peft_format import BaseModel
from fedloom.platform.pictures import client_accuracy, pictures
from fedloom.platform.preparation import Prepared
from fedloom.platform.ray_job import command_to_resume
from fedloom.platform.rounds import Round
from fedloom.platform.run_folder import SHOWN_DIGITS, describe, folder_of, is_described, note_job
from fedloom.platform.tracking import TrackedRun, Tracking
from fedloom.platform.world.ledger import ledger_bytes


class RecordedRun:
    """One run of an experiment, or what is left of one that was cut.

    Attributes:
        run_id: MLflow's.
        played: the rounds so far, round 0 first.
    """

    def __init__(self, prepared: Prepared, executor: Executor, tracked: TrackedRun, checkpoints: Checkpoints) -> None:
        """Take over an open MLflow run and its folder."""
        self.run_id = tracked.run_id
        self.played: list[Round] = []
        self._experiment = prepared.experiment
        self._prepared = prepared
        self._executor = executor
        self._tracked = tracked
        self._checkpoints = checkpoints

    @property
    def notes(self) -> Sequence[str]:
        """What was passed over when the run was put back, in words."""
        return self._checkpoints.notes

    def restored(self, done: Round) -> bool:
        """Whether a round was played before and is only read back."""
        return done.number < self._checkpoints.num_restored

    def rounds(self) -> Iterator[Round]:
        """Yield the rounds; after the last one the final adapter, the ledger and the pictures are recorded."""
        base = base_of(self._experiment, self._prepared)
        for done in run_through_loss(self._experiment, self._prepared, self._executor, self._checkpoints):
            self.played.append(done)
            self._record(done)
            if _to_be_saved(self._experiment, done.number) and not self.restored(done):
                self._tracked.adapter(f"round-{done.number:04d}", self._executor.export(), base)
            yield done
        self._tracked.adapter("final", self._executor.export(), base)
        self._record_end()

    def _record(self, done: Round) -> None:
        """Log a round's metrics, against rounds and against what they cost."""
        self._tracked.log(done.number, done.metrics)
        for step, metrics in over_costs(done.metrics):
            self._tracked.log(step, metrics)

    def _record_end(self) -> None:
        """Record the tables and pictures of a run that has reached its last round."""
        played, tracked = self.played, self._tracked
        tracked.files("", {"ledger.parquet": ledger_bytes([(done.number, done.records) for done in played])})
        tracked.files("plots", pictures([(done.number, done.metrics, done.records) for done in played]))
        if played[-1].clients:
            tracked.files("", {"clients.csv": clients_csv(played[-1].clients)})
            tracked.files("plots", {"client_accuracy.png": client_accuracy(played[-1].clients)})


@contextlib.contextmanager
def recorded_run(
    prepared: Prepared,
    executor: Executor,
    tracking: Tracking,
    *,
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
    resume: str | None = None,
) -> Iterator[RecordedRun]:
    """Open the MLflow run and the folder of a prepared experiment, or of the run whose id ``resume`` is.

    What ends a run before its end is told the command with which it goes on.

    Raises:
        TrackingError: the store cannot be written.
        CheckpointError: another process holds the run, or its folder cannot be written.
    """
    experiment = prepared.experiment
    facts = {"data.fingerprint": prepared.data.fingerprint, "executor": type(executor).__name__, **(tags or {})}
    opened = (
        tracking.run(experiment, tags=facts, parent_run_id=parent_run_id)
        if resume is None
        else tracking.resumed(resume, tags=facts)
    )
    with (
        opened as tracked,
        Checkpoints(
            folder_of(tracked.run_id), every=experiment.checkpoint.every, keep=experiment.checkpoint.keep
        ) as checkpoints,
    ):
        run_id = tracked.run_id
        if not is_described(run_id):
            describe(run_id, experiment, fingerprint=prepared.data.fingerprint, tracking_uri=tracking.uri)
        note_job(run_id)
        try:
            yield RecordedRun(prepared, executor, tracked, checkpoints)
        except BaseException as error:
            error.add_note(f"go on with: {command_to_resume(run_id[:SHOWN_DIGITS])}")
            raise


def base_of(experiment: Experiment, prepared: Prepared) -> BaseModel:
    """Return what a saved adapter says of the model that it belongs to."""
    spec = prepared.spec
    return BaseModel(
        name=experiment.model.name,
        path=spec.path,
        revision=spec.revision,
        task=experiment.data.task,
        num_labels=len(spec.label_names) or None,
        label_names=spec.label_names,
        head_modules=prepared.head_modules,
    )


def over_costs(metrics: Mapping[str, float]) -> list[tuple[int, dict[str, float]]]:
    """Return the evaluation under names of their own, with whole simulated seconds and megabytes in place of rounds.

    MLflow draws a metric against its steps, which are integers.
    """
    evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    costs = {"over_sim_seconds": metrics.get("sim/seconds"), "over_megabytes": metrics.get("bytes/total", 0.0) / 1e6}
    return [
        (int(cost), {f"{axis}/{name.removeprefix('eval/')}": value for name, value in evaluated.items()})
        for axis, cost in costs.items()
        if cost is not None and evaluated
    ]


def _to_be_saved(experiment: Experiment, number: int) -> bool:
    """Whether ``save_every`` asks for the adapter after this round; the last one is saved anyway."""
    return experiment.save_every is not None and 0 < number < experiment.rounds and number % experiment.save_every == 0
