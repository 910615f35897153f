"""One tracked run, shown while it runs."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedloom.jobs.display import Display
from fedloom.platform.executor import Executor, LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.interrupts import sigterm_interrupts
from fedloom.platform.population import groups_of, pools_of
from fedloom.platform.preparation import Prepared, gpu_needs
from fedloom.platform.recording import recorded_run
from fedloom.platform.rounds import Round
from fedloom.platform.tracking import Tracking


@contextlib.contextmanager
def open_executor(
    experiment: Experiment, prepared: Prepared, *, local: bool = False, address: str | None = None
) -> Iterator[Executor]:
    """Start the executor, and close it whatever happens. SIGTERM ends a run as Ctrl-C does."""
    executor: Executor
    with sigterm_interrupts():
        if local:
            executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment), groups_of(experiment))
        else:
            from fedloom.platform.ray_executor import RayExecutor

            executor = RayExecutor(
                prepared.spec,
                prepared.data,
                pools_of(experiment),
                groups_of(experiment),
                address=address,
                gpu_needs=gpu_needs(prepared),
            )
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

    Returns the MLflow run's id and the rounds, round 0 first.
    """
    variant = replace(prepared, experiment=experiment)
    with (
        recorded_run(variant, executor, tracking, tags=tags, parent_run_id=parent_run_id, resume=resume) as recorded,
        Display(title or experiment.method.name, experiment, num_clients=len(prepared.clients)) as display,
    ):
        for done in recorded.rounds():
            display.show(done, restored=recorded.restored(done), notes=recorded.notes)
    return recorded.run_id, recorded.played
