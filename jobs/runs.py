"""One tracked run: the driver's rounds, logged, shown and saved."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from fedloom.jobs.display import Display
from fedloom.jobs.run_folder import SHOWN_DIGITS, describe, folder_of
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run_through_loss
from fedloom.platform.evaluation import clients_csv
from fedloom.platform.executor import Executor, LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.interrupts import sigterm_interrupts
from fedloom.platform.peft_format import BaseModel
from fedloom.platform.pictures import client_accuracy, pictures
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import Prepared
from fedloom.platform.rounds import Round
from fedloom.platform.tracking import TrackedRun, Tracking
from fedloom.platform.world.ledger import ledger_bytes


@contextlib.contextmanager
def open_executor(
    experiment: Experiment, prepared: Prepared, *, local: bool = False, address: str | None = None
) -> Iterator[Executor]:
    """Start the executor, and close it whatever happens. SIGTERM ends a run as Ctrl-C does."""
    executor: Executor
    with sigterm_interrupts():
        if local:
            executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
        else:
            from fedloom.platform.ray_executor import RayExecutor

            executor = RayExecutor(prepared.spec, prepared.data, pools_of(experiment), address=address)
        try:
            yield executor
        finally:
            executor.close()


def execute(
    experiment: Experiment,
    prepared: Prepared,
    executor: Executor,
    tracking: Tracking,
    *,
    title: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
    resume: str | None = None,
) -> tuple[str, list[Round]]:
    """Run an experiment to its last round, or go on with the run whose id ``resume`` is.

    Returns the MLflow run's id and the rounds, round 0 first. What ends a run before its end is told the command with
    which it goes on.
    """
    facts = {"data.fingerprint": prepared.data.fingerprint, "executor": type(executor).__name__, **(tags or {})}
    recorded = (
        tracking.run(experiment, tags=facts, parent_run_id=parent_run_id)
        if resume is None
        else tracking.resumed(resume, tags=facts)
    )
    with (
        recorded as tracked,
        Checkpoints(
            folder_of(tracked.run_id), every=experiment.checkpoint.every, keep=experiment.checkpoint.keep
        ) as checkpoints,
        Display(title or experiment.method.name, experiment, num_clients=len(prepared.clients)) as display,
    ):
        if resume is None:
            fingerprint = prepared.data.fingerprint
            describe(tracked.run_id, experiment, fingerprint=fingerprint, tracking_uri=tracking.uri)
        try:
            rounds = []
            base = base_of(experiment, prepared)
            for done in run_through_loss(experiment, prepared, executor, checkpoints):
                rounds.append(done)
                restored = done.number < checkpoints.num_restored
                _record(tracked, done)
                display.show(done, restored=restored, notes=checkpoints.notes)
                if _to_be_saved(experiment, done.number) and not restored:
                    tracked.adapter(f"round-{done.number:04d}", executor.export(), base)
            tracked.adapter("final", executor.export(), base)
            _record_end(tracked, rounds)
        except BaseException as error:
            error.add_note(f"go on with: fedloom resume {tracked.run_id[:SHOWN_DIGITS]}")
            raise
    return tracked.run_id, rounds


def _record(tracked: TrackedRun, done: Round) -> None:
    """Log a round's metrics, against rounds and against what they cost."""
    tracked.log(done.number, done.metrics)
    for step, metrics in over_costs(done.metrics):
        tracked.log(step, metrics)


def _to_be_saved(experiment: Experiment, number: int) -> bool:
    """Whether ``save_every`` asks for the adapter after this round; the last one is saved anyway."""
    return experiment.save_every is not None and 0 < number < experiment.rounds and number % experiment.save_every == 0


def _record_end(tracked: TrackedRun, rounds: Sequence[Round]) -> None:
    """Record the tables and pictures of a run that has reached its last round."""
    tracked.files("", {"ledger.parquet": ledger_bytes([(done.number, done.records) for done in rounds])})
    tracked.files("plots", pictures([(done.number, done.metrics, done.records) for done in rounds]))
    if rounds[-1].clients:
        tracked.files("", {"clients.csv": clients_csv(rounds[-1].clients)})
        tracked.files("plots", {"client_accuracy.png": client_accuracy(rounds[-1].clients)})


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
