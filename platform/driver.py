"""The driver: one generator of rounds, read from top to bottom.

The caller logs, prints, saves or stops by leaving its own ``for``.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec, load_tokenizer
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.errors import ExperimentError, RoundError
from fedloom.platform.evaluation import shards_of, total
from fedloom.platform.executor import Executor
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Client
from fedloom.platform.population import chunks_of, clients_of, cohort_of
from fedloom.platform.registry import method_class
from fedloom.platform.worker import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that is known before a machine is asked for.

    Attributes:
        spec: how to build the base model.
        data: tokenised and partitioned examples.
        clients: the population, each client with its profile.
        shapes: (d_out, d_in) by target module.
        head_modules: modules that are trained in full.
        shards: the held-out examples, cut for evaluation.
    """

    spec: ModelSpec
    data: FederatedData
    clients: Sequence[Client]
    shapes: Mapping[str, tuple[int, int]]
    head_modules: tuple[str, ...]
    shards: Sequence[np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished round; number 0 is the untrained model, evaluated."""

    number: int
    metrics: Mapping[str, float]
    records: Sequence[Record] = field(default_factory=tuple)


def prepare(experiment: Experiment) -> Prepared:
    """Read the data, assign the profiles and build the architecture without weights.

    Raises:
        FedloomError: anything in the experiment that cannot work, before a machine is asked for.
    """
    tokenizer = load_tokenizer(experiment)
    data = prepare_data(experiment, tokenizer)
    clients = clients_of(experiment, {name: len(indices) for name, indices in data.clients.items()})
    spec = ModelSpec.of(experiment, label_names=data.label_names, pad_token_id=data.pad_token_id)
    host = AdapterHost(spec, device="meta")
    prepared = Prepared(
        spec=spec,
        data=data,
        clients=clients,
        shapes=host.shapes,
        head_modules=host.head_modules,
        shards=shards_of(experiment, data),
    )
    global_rank(experiment, prepared)
    return prepared


def global_rank(experiment: Experiment, prepared: Prepared) -> int:
    """Return the rank of the server's adapter: the experiment's, or the method's rule over the clients' ranks.

    Raises:
        ExperimentError: a rank that a layer, the method or a client's machine cannot bear.
    """
    traits = method_class(experiment.method.name).traits
    if traits.needs_head and not prepared.head_modules:
        raise ExperimentError(
            f"key method.name: {experiment.method.name!r} trains a classifier's head, and data.task is "
            f"{experiment.data.task!r}. Set data.task to 'classification', or choose another method."
        )
    ranks = {profile.name: profile.rank for profile in experiment.population.profiles}
    smallest, largest = min(ranks.values()), max(ranks.values())
    rank = experiment.adapter.rank or (smallest if traits.global_rank == "min" else largest)
    if traits.global_rank == "min" and rank > smallest:
        poorest = min(ranks, key=lambda name: ranks[name])
        raise ExperimentError(
            f"key adapter.rank: {traits.title} trains every client at rank {rank}, but profile {poorest!r} bears only "
            f"{smallest}. Set adapter.rank to at most {smallest}, or leave it out."
        )
    if traits.global_rank == "max" and rank < largest:
        richest = max(ranks, key=lambda name: ranks[name])
        raise ExperimentError(
            f"key adapter.rank: the global rank {rank} is smaller than the rank {largest} of profile {richest!r}. "
            f"Set adapter.rank to at least {largest}, or leave it out."
        )
    module, (d_out, d_in) = min(prepared.shapes.items(), key=lambda item: min(item[1]))
    if rank > min(d_out, d_in):
        key = "adapter.rank" if experiment.adapter.rank else "population.profiles.rank"
        raise ExperimentError(
            f"key {key}: rank {rank} is larger than module {module!r} allows, which is {d_out} x {d_in}. "
            f"Set it to at most {min(d_out, d_in)}."
        )
    return rank


def run(experiment: Experiment, prepared: Prepared, executor: Executor) -> Iterator[Round]:
    """Yield the untrained model as round 0, then each finished round.

    Raises:
        RoundError: fewer than ``cohort.min_updates`` updates were accepted.
    """
    executor.begin(experiment, prepared.shapes, global_rank(experiment, prepared))
    yield Round(number=0, metrics=_evaluated(experiment, prepared, executor))
    bytes_total = 0
    for number in range(1, experiment.rounds + 1):
        begin = time.perf_counter()
        cohort = cohort_of(experiment, prepared.clients, number)
        chunks = chunks_of(experiment, cohort)
        records = executor.train(chunks)
        _check_quorum(experiment, number, records)
        metrics = executor.finish(len(chunks))
        metrics |= summary(records)
        bytes_total += int(metrics["bytes/down"] + metrics["bytes/up"])
        metrics["bytes/total"] = bytes_total
        if number % experiment.evaluation.every == 0 or number == experiment.rounds:
            metrics |= _evaluated(experiment, prepared, executor)
        metrics["seconds"] = time.perf_counter() - begin
        yield Round(number=number, metrics=metrics, records=records)


def summary(records: Sequence[Record]) -> dict[str, float]:
    """Return a round's traffic, the number of accepted updates and their example-weighted loss."""
    accepted = [record for record in records if record.refused is None]
    weight = sum(record.num_examples for record in accepted)
    return {
        "train/loss": sum(record.loss * record.num_examples for record in accepted) / weight,
        "bytes/down": sum(record.bytes_down for record in records),
        "bytes/up": sum(record.bytes_up for record in records),
        "updates": len(accepted),
    }


def _evaluated(experiment: Experiment, prepared: Prepared, executor: Executor) -> dict[str, float]:
    return total(executor.evaluate(prepared.shards, experiment.evaluation.batch_size))


def _check_quorum(experiment: Experiment, number: int, records: Sequence[Record]) -> None:
    refused = [record for record in records if record.refused is not None]
    if len(records) - len(refused) < experiment.cohort.min_updates:
        first = f"; e.g. client {refused[0].client!r}: {refused[0].refused}" if refused else ""
        raise RoundError(
            f"round {number}: {len(records) - len(refused)} of {len(records)} updates were accepted, "
            f"cohort.min_updates asks for {experiment.cohort.min_updates}{first}"
        )
