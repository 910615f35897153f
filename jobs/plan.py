"""``fedloom plan``: what an experiment will send, compute, hold and take, before anything is paid."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from fedloom.jobs.display import bytes_in_words
from fedloom.jobs.probe import Probe, probe
from fedloom.platform.deepspeed_build import check_installed
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import Resources, groups_of, pools_of, resources_of
from fedloom.platform.preparation import Prepared, footprint, global_rank, trained_ranks
from fedloom.platform.quantization import check_quantization
from fedloom.platform.ray_cluster import actors_per_pool, cluster_nodes, fitting
from fedloom.platform.record import Record
from fedloom.platform.world.forecast import Forecast, forecast
from fedloom.platform.world.memory import GIB, footprint_on, memory_bytes_of

SECONDS_IN_WORDS = ((3600.0, "h"), (60.0, "min"))
OF_THIS_MACHINE = ("num_cpus", "num_gpus", "memory_gib")
Node = Mapping[str, float]


def show_plan(prepared: Prepared, *, address: str | None = None, measure: bool = True) -> None:
    """Print the plan for a cluster, or for this machine where there is no address.

    Raises:
        ExperimentError: the cluster or this machine cannot hold an actor of every pool.
        MachineError: it lacks a device or a package that the experiment needs.
    """
    experiment = prepared.experiment
    nodes, demands = _place(experiment, address)
    have_gpus = any(node.get("num_gpus", 0.0) > 0 for node in nodes)
    check_quantization(experiment.model.quantization, "cuda" if have_gpus else "cpu", here=address is None)
    if address is None and groups_of(experiment):
        check_installed()
    total = {name: sum(node.get(name, 0.0) for node in nodes) for node in nodes for name in node}
    actors = actors_per_pool(demands, total, total)
    predicted = forecast(experiment, prepared)
    console = Console()
    per_round = len(predicted.records) / predicted.rounds
    console.print(
        f"{experiment.name}: {experiment.method.name}, {len(prepared.clients)} clients, {per_round:g} of them in each "
        f"of {experiment.rounds} rounds, global rank {global_rank(experiment, prepared)}",
        highlight=False,
    )
    console.print(_costs(experiment, predicted))
    console.print(_profiles(predicted))
    console.print(_machines(prepared, demands, actors, nodes))
    for line in _tasks(prepared):
        console.print(line, highlight=False, soft_wrap=True)
    if address is None and any(set(dict(pool)) - set(OF_THIS_MACHINE) for pool in demands):
        console.print("custom resources are not known here; --address asks a cluster", highlight=False)
    if measure:
        for line in _real_time(prepared, predicted, probe(prepared), actors):
            console.print(line, highlight=False)


def _place(experiment: Experiment, address: str | None) -> tuple[Sequence[Node], dict[Resources, Resources]]:
    """Return the nodes' resources, and what an actor of each pool takes of them."""
    pools = pools_of(experiment)
    if address is not None:
        nodes: Sequence[Node] = cluster_nodes(address)
        have_gpus = any(node.get("num_gpus", 0.0) > 0 for node in nodes)
        names = {name for pool in pools for name, _ in pool}
    else:
        machine = {
            "num_cpus": float(os.cpu_count() or 1),
            "num_gpus": float(torch.cuda.device_count()),
            "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        }
        nodes, have_gpus, names = [machine], machine["num_gpus"] > 0, set(OF_THIS_MACHINE)
    if not have_gpus:
        names.discard("num_gpus")  # as in a run: profiles with GPUs then train on CPUs
    return nodes, {pool: tuple(entry for entry in pool if entry[0] in names) for pool in pools}


def _costs(experiment: Experiment, predicted: Forecast) -> Table:
    table = Table("", "a round", f"{experiment.rounds} rounds")
    rows: dict[str, tuple[float, Callable[[float], str]]] = {
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


def _profiles(predicted: Forecast) -> Table:
    """Return means over the clients of each profile that the played rounds sampled."""
    timed = {"download": "download_s", "training": "compute_s", "upload": "upload_s"} if predicted.sim_s else {}
    table = Table("profile", "rank", "bytes down", "bytes up", *timed)
    for name in sorted({record.profile for record in predicted.records}):
        own = [record for record in predicted.records if record.profile == name]

        def mean(field: str, own: Sequence[Record] = own) -> float:
            return float(sum(getattr(record, field) for record in own)) / len(own)

        table.add_row(
            name,
            f"{mean('rank'):g}",
            bytes_in_words(mean("bytes_down")),
            bytes_in_words(mean("bytes_up")),
            *(in_words(mean(field)) for field in timed.values()),
        )
    return table


def _machines(
    prepared: Prepared,
    demands: Mapping[Resources, Resources],
    actors: Mapping[Resources, int],
    nodes: Sequence[Node],
) -> Table:
    """Return what training holds in the memory of an actor of each profile, and how many actors there are."""
    process = footprint(prepared)
    ranks = trained_ranks(prepared.experiment, prepared)
    table = Table("profile", "weights", "activations", "all in training", "of", "actors", "most on a node")
    for profile in prepared.experiment.population.profiles:
        pool = resources_of(profile)
        have = memory_bytes_of(profile)
        held = footprint_on(profile, process)
        alone = [fitting(demands[pool], node) for node in nodes]
        table.add_row(
            profile.name,
            bytes_in_words(held.weights_bytes),
            "not known" if held.activation_bytes is None else bytes_in_words(held.activation_bytes),
            bytes_in_words(held.total_bytes(ranks[profile.name])),
            "-" if have is None else bytes_in_words(have),
            str(actors[pool]),
            ", ".join(str(count) for count in sorted(set(alone), reverse=True)),
        )
    return table


def _tasks(prepared: Prepared) -> list[str]:
    """Return what each task asks: tokens, and two operations for every token and weight of the base's linear layers."""
    rounds, lines = prepared.experiment.rounds, []
    for task in prepared.tasks:
        times = task.times(rounds)
        flop = 2 * prepared.base_parameters * (task.num_read + task.num_written)
        lines.append(
            f"task {task.task.name}: {len(task.questions)} questions, asked {times} time{'s' * (times > 1)}; each time "
            f"{task.num_read} tokens are read, {task.num_written} written at most, in about {flop:.3g} operations"
        )
    return lines


def _real_time(prepared: Prepared, predicted: Forecast, measured: Probe, actors: Mapping[Resources, int]) -> list[str]:
    """Return the estimate of real time: pools train side by side, so that the slowest one sets the pace."""
    experiment = prepared.experiment
    pool_of = {profile.name: resources_of(profile) for profile in experiment.population.profiles}
    # A profile that the probe met but the played rounds did not has no part in the estimate.
    clients = Counter(record.profile for record in predicted.records)
    busy_s: Counter[Resources] = Counter()
    for profile, count in clients.items():
        busy_s[pool_of[profile]] += measured.training_s[profile] * count / predicted.rounds  # type: ignore[assignment]
    round_s = max((seconds / actors[pool] for pool, seconds in busy_s.items()), default=0.0)
    evaluations = 2 + (experiment.rounds - 1) // experiment.evaluation.every
    training_s = round_s * experiment.rounds
    evaluation_s = measured.evaluation_s * evaluations / sum(actors.values())
    tasks_s = sum(measured.tasks_s[task.task.name] * task.times(experiment.rounds) for task in prepared.tasks)
    tasks_s /= sum(actors.values())
    answering = f", {in_words(tasks_s)} answering tasks" if prepared.tasks else ""
    memory = f"{measured.memory_gib:.3g} GiB of memory"
    if measured.gpu_memory_gib:
        memory += f" and {measured.gpu_memory_gib:.3g} GiB of GPU memory"
    return [
        f"real time on such machines as this: about {in_words(training_s + evaluation_s + tasks_s)}, of which "
        f"{in_words(training_s)} training{answering} and {in_words(evaluation_s)} in {evaluations} evaluations, by a "
        "probe of one client of every profile; the start comes on top",
        f"the probe's process, with one base model, the data and the server, took at most {memory}",
    ]


def in_words(seconds: float) -> str:
    """Return a time with three digits in the largest unit that it fills, e.g. ``2.5 min``."""
    if not math.isfinite(seconds):
        return "for ever"
    for size, unit in SECONDS_IN_WORDS:
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
