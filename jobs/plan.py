"""``fedloom plan``: what an experiment will send, compute and take, before anything is paid."""

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedloom.jobs.display import bytes_in_words
from fedloom.platform.driver import Prepared, global_rank
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, pools_of, tasks_of
from fedloom.platform.ray_executor import actors_per_pool
from fedloom.platform.worker import Record
from fedloom.platform.world.forecast import Forecast, forecast

SECONDS_IN_WORDS = ((3600.0, "h"), (60.0, "min"))


def show_plan(experiment: Experiment, prepared: Prepared, *, probe: bool) -> None:
    """Print the plan.

    Raises:
        ExperimentError: this machine cannot hold an actor of every pool.
    """
    pools = pools_of(experiment)
    machine = {"num_cpus": float(os.cpu_count() or 1)}
    # A GPU fraction is dropped where there is no GPU, as in a run; other resources are the cluster's to say.
    demands = {pool: tuple(entry for entry in pool if entry[0] == "num_cpus") for pool in pools}
    actors = actors_per_pool(demands, machine, machine)
    predicted = forecast(experiment, prepared)
    console = Console()
    console.print(
        f"{experiment.name}: {experiment.method.name}, {len(prepared.clients)} clients, {experiment.cohort.size} "
        f"of them in each of {experiment.rounds} rounds, global rank {global_rank(experiment, prepared)}",
        highlight=False,
    )
    console.print(_costs(experiment, predicted))
    console.print(_profiles(predicted.records))
    console.print(f"client actors on this machine: {sum(actors.values())}", highlight=False)
    if probe:
        seconds = probe_seconds(experiment, prepared) * experiment.cohort.size * experiment.rounds
        console.print(
            f"training on this machine: about {in_words(seconds / sum(actors.values()))}, by a probe of one client; "
            "start and evaluations come on top",
            highlight=False,
        )


def _costs(experiment: Experiment, predicted: Forecast) -> Table:
    table = Table("", "a round", f"{experiment.rounds} rounds")
    rows = {
        "bytes down": (predicted.bytes_down, bytes_in_words),
        "bytes up": (predicted.bytes_up, bytes_in_words),
        "floating-point operations": (predicted.flop, lambda amount: f"{amount:.3g}"),
    }
    for name, (amount, words) in rows.items():
        table.add_row(name, words(amount), words(amount * experiment.rounds))
    if predicted.sim_s is not None:
        table.add_row("simulated time", in_words(predicted.sim_s), in_words(predicted.sim_s * experiment.rounds))
        table.add_row("past the deadline", f"{predicted.stragglers:.1f} clients", "")
    return table


def _profiles(records: Sequence[Record]) -> Table:
    """Return means over the clients of each profile that the played rounds sampled."""
    table = Table("profile", "rank", "bytes down", "bytes up", "download", "training", "upload")
    for name in sorted({record.profile for record in records}):
        own = [record for record in records if record.profile == name]

        def mean(field: str, own: Sequence[Record] = own) -> float:
            return float(sum(getattr(record, field) for record in own)) / len(own)

        table.add_row(
            name,
            f"{mean('rank'):g}",
            bytes_in_words(mean("bytes_down")),
            bytes_in_words(mean("bytes_up")),
            *(in_words(mean(field)) for field in ("download_s", "compute_s", "upload_s")),
        )
    return table


def probe_seconds(experiment: Experiment, prepared: Prepared) -> float:
    """Train one client of each pool for real, twice, and return the slowest one's real seconds the second time."""
    first = {client.profile: client for client in reversed(prepared.clients)}
    single = experiment.model_copy(update={"chunk_size": 1})
    chunks = chunks_of(single, tasks_of(single, list(first.values()), prepared.shapes))
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    try:
        executor.begin(single, prepared.shapes, global_rank(experiment, prepared))
        executor.train(chunks)
        executor.finish(len(chunks))
        return max(record.seconds for record in executor.train(chunks))
    finally:
        executor.close()


def in_words(seconds: float) -> str:
    """Return a time with three digits in the largest unit that it fills, e.g. ``2.5 min``."""
    for size, unit in SECONDS_IN_WORDS:
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
