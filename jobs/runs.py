"""One tracked run: the driver's rounds, logged, shown and saved."""

import contextlib
import signal
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NoReturn

from fedloom.jobs.display import Display
from fedloom.platform.driver import Round
from fedloom.platform.driver import run as rounds_of
from fedloom.platform.evaluation import clients_csv
from fedloom.platform.executor import Executor, LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.peft_format import BaseModel
from fedloom.platform.pictures import client_accuracy, pictures
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import Prepared
from fedloom.platform.tracking import Tracking
from fedloom.platform.world.ledger import ledger_bytes


@contextlib.contextmanager
def open_executor(
    experiment: Experiment, prepared: Prepared, *, local: bool = False, address: str | None = None
) -> Iterator[Executor]:
    """Start the executor, and close it whatever happens. SIGTERM ends a run as Ctrl-C does."""
    executor: Executor
    with _sigterm_interrupts():
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
) -> tuple[str, list[Round]]:
    """Run an experiment to its last round. Returns the MLflow run's id and the rounds, round 0 first."""
    facts = {"data.fingerprint": prepared.data.fingerprint, "executor": type(executor).__name__}
    base = base_of(experiment, prepared)
    rounds = []
    with (
        tracking.run(experiment, tags=facts | dict(tags or {}), parent_run_id=parent_run_id) as tracked,
        Display(title or experiment.method.name, experiment, num_clients=len(prepared.clients)) as display,
    ):
        for done in rounds_of(experiment, prepared, executor):
            rounds.append(done)
            tracked.log(done.number, done.metrics)
            for step, metrics in over_costs(done.metrics):
                tracked.log(step, metrics)
            display.show(done)
            if (
                experiment.save_every
                and 0 < done.number < experiment.rounds
                and done.number % experiment.save_every == 0
            ):
                tracked.adapter(f"round-{done.number:04d}", executor.export(), base)
        tracked.adapter("final", executor.export(), base)
        tracked.files("", {"ledger.parquet": ledger_bytes([(done.number, done.records) for done in rounds])})
        tracked.files("plots", pictures([(done.number, done.metrics, done.records) for done in rounds]))
        if rounds[-1].clients:
            tracked.files("", {"clients.csv": clients_csv(rounds[-1].clients)})
            tracked.files("plots", {"client_accuracy.png": client_accuracy(rounds[-1].clients)})
    return tracked.run_id, rounds


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


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
