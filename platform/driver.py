"""The driver: one generator of rounds, read from top to bottom.

The caller logs, prints, saves or stops by leaving its own ``for``.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.platform.errors import RoundError
from fedloom.platform.evaluation import ClientScore, spread, total
from fedloom.platform.executor import Executor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of
from fedloom.platform.preparation import Prepared, global_rank, world_of
from fedloom.platform.worker import Record
from fedloom.platform.world.ledger import totals

COSTS = {"bytes": "bytes/total", "sim_seconds": "sim/seconds"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished round; number 0 is the untrained model, evaluated. The last one has the ``clients``' own scores."""

    number: int
    metrics: Mapping[str, float]
    records: Sequence[Record] = field(default_factory=tuple)
    clients: Sequence[ClientScore] = field(default_factory=tuple)


def run(experiment: Experiment, prepared: Prepared, executor: Executor) -> Iterator[Round]:
    """Yield the untrained model as round 0, then each finished round.

    Raises:
        RoundError: fewer than ``cohort.min_updates`` updates were accepted, and such rounds are not skipped.
    """
    world = world_of(experiment, prepared)
    executor.begin(experiment, prepared.shapes, global_rank(experiment, prepared))
    yield Round(number=0, metrics=_evaluated(experiment, prepared, executor))
    bytes_total = 0
    reached = Reached(experiment.evaluation.targets)
    for number in range(1, experiment.rounds + 1):
        begin = time.perf_counter()
        opened = world.open(number)
        chunks = chunks_of(experiment, opened.tasks)
        records = executor.train(chunks)
        _check_quorum(experiment, number, records)
        metrics = {**executor.finish(len(chunks)), **opened.facts, **totals(records), **world.close(records)}
        bytes_total += int(metrics["bytes/down"] + metrics["bytes/up"])
        metrics["bytes/total"] = bytes_total
        if number % experiment.evaluation.every == 0 or number == experiment.rounds:
            metrics |= _evaluated(experiment, prepared, executor)
        clients = _client_scores(experiment, prepared, executor) if number == experiment.rounds else []
        metrics |= spread(clients) | reached.new(metrics)
        metrics["seconds"] = time.perf_counter() - begin
        yield Round(number=number, metrics=metrics, records=records, clients=clients)


class Reached:
    """What it took to reach each target accuracy: known from the first evaluation that shows it."""

    def __init__(self, targets: Sequence[float]) -> None:
        self._waiting = sorted(targets)

    def new(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the costs of the targets that these metrics are the first to reach."""
        accuracy = metrics.get("eval/accuracy", -math.inf)
        found = [target for target in self._waiting if target <= accuracy]
        self._waiting = [target for target in self._waiting if target > accuracy]
        costs = {name: metrics[source] for name, source in COSTS.items() if source in metrics}
        return {f"to_accuracy/{target:g}/{name}": cost for target in found for name, cost in costs.items()}


def _evaluated(experiment: Experiment, prepared: Prepared, executor: Executor) -> dict[str, float]:
    return total(executor.evaluate(prepared.shards, experiment.evaluation.batch_size))


def _client_scores(experiment: Experiment, prepared: Prepared, executor: Executor) -> list[ClientScore]:
    """Score the global model on clients' own examples, a client a shard."""
    by_id = {client.id: client for client in prepared.clients}
    scores = executor.evaluate(list(prepared.client_shards.values()), experiment.evaluation.batch_size)
    return [
        ClientScore(
            client=name,
            profile=by_id[name].profile,
            rank=by_id[name].rank,
            num_examples=len(shard),
            loss=done.loss / max(1, done.count),
            accuracy=done.correct / max(1, done.count),
        )
        for (name, shard), done in zip(prepared.client_shards.items(), scores, strict=True)
    ]


def _check_quorum(experiment: Experiment, number: int, records: Sequence[Record]) -> None:
    refused = [record for record in records if record.refused is not None]
    accepted = len(records) - len(refused)
    if accepted >= experiment.cohort.min_updates or experiment.cohort.on_missing == "skip":
        return
    reason = "; no client was reachable" if not records else ""
    if refused:
        reason = f"; e.g. client {refused[0].client!r}: {refused[0].refused}"
    raise RoundError(
        f"round {number}: {accepted} of {len(records)} updates were accepted, cohort.min_updates asks for "
        f"{experiment.cohort.min_updates}{reason}. Set cohort.on_missing to 'skip' to record such rounds and go on."
    )
