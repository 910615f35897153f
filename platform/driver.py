"""The driver: one generator of rounds, read from top to bottom.

The caller logs, prints, saves or stops by leaving its own ``for``.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.errors import RoundError, ServerLostError
from fedloom.platform.evaluation import ClientScore, spread, total
from fedloom.platform.executor import Executor
from fedloom.platform.experiment import Experiment, FaultSection
from fedloom.platform.population import chunks_of
from fedloom.platform.preparation import Prepared, global_rank, world_of
from fedloom.platform.privacy import epsilon_after
from fedloom.platform.record import Record
from fedloom.platform.registry import method_class
from fedloom.platform.rounds import Round
from fedloom.platform.tasks.answers import task_metrics
from fedloom.platform.world.ledger import totals
from fedloom.platform.world.world import World

COSTS = {"bytes": "bytes/total", "sim_seconds": "sim/seconds"}


def run(
    experiment: Experiment, prepared: Prepared, executor: Executor, checkpoints: Checkpoints | None = None
) -> Iterator[Round]:
    """Yield the untrained model as round 0, then each finished round.

    With ``checkpoints`` every round is on disk before it is yielded; rounds that are there already are yielded as they
    were, and the run goes on after them with the same bits.

    Raises:
        RoundError: fewer than ``cohort.min_updates`` updates were accepted, and such rounds are not skipped.
        CheckpointError: a checkpoint cannot be written.
    """
    world = world_of(experiment, prepared)
    tally = Tally(experiment.evaluation.targets)
    executor.begin(experiment, prepared.shapes, global_rank(experiment, prepared))
    saved = checkpoints.load() if checkpoints is not None else None
    if saved is not None:
        executor.restore(saved.snapshot)
        world.go_on(saved.progress["world"])
        tally.go_on(saved.progress["tally"])
        yield from saved.rounds
    else:
        done = Round(
            number=0, metrics=_evaluated(experiment, prepared, executor) | _answered(experiment, prepared, executor, 0)
        )
        if checkpoints is not None:
            checkpoints.add(done)
        yield done
    for number in range(len(saved.rounds) if saved is not None else 1, experiment.rounds + 1):
        done = _played(experiment, prepared, executor, world=world, tally=tally, number=number)
        if checkpoints is not None:
            checkpoints.add(done)
            if checkpoints.due(number, experiment.rounds):
                snapshot = executor.snapshot(checkpoints.num_pieces)
                checkpoints.save(number, snapshot, {"world": world.progress(), "tally": tally.progress()})
        yield done


def _played(
    experiment: Experiment, prepared: Prepared, executor: Executor, *, world: World, tally: "Tally", number: int
) -> Round:
    """Play one round: sample, train, fold, evaluate, count."""
    begin = time.perf_counter()
    opened = world.open(number)
    chunks = chunks_of(experiment, opened.tasks)
    records = executor.train(chunks)
    tally.check_faults(experiment.faults, number, records)
    _check_quorum(experiment, number, records)
    metrics = {**executor.finish(len(chunks)), **opened.facts, **totals(records), **world.close(records)}
    if number % experiment.evaluation.every == 0 or number == experiment.rounds:
        metrics |= _evaluated(experiment, prepared, executor)
    metrics |= _answered(experiment, prepared, executor, number)
    if experiment.updates.noise_multiplier is not None:
        metrics["privacy/epsilon"] = epsilon_after(experiment, number, len(prepared.clients))
    clients = _client_scores(experiment, prepared, executor) if number == experiment.rounds else []
    metrics |= tally.after(metrics) | spread(clients)
    if clients and method_class(experiment.method.name).traits.personal:
        own = _client_scores(experiment, prepared, executor, personal=True)
        metrics |= {name.replace("clients/", "personal/"): value for name, value in spread(own).items()}
    metrics["seconds"] = time.perf_counter() - begin
    return Round(number=number, metrics=metrics, records=records, clients=clients)


def run_through_loss(
    experiment: Experiment, prepared: Prepared, executor: Executor, checkpoints: Checkpoints
) -> Iterator[Round]:
    """Yield the rounds of :func:`run`, each once; if the server is lost, go on from the last checkpoint.

    Raises:
        ServerLostError: it was lost more often than ``faults.infrastructure`` allows.
    """
    number, losses = 0, 0
    while True:
        try:
            for done in run(experiment, prepared, executor, checkpoints):
                if done.number >= number:
                    number = done.number + 1
                    yield done
            return
        except ServerLostError:
            losses += 1
            if losses > experiment.faults.infrastructure:
                raise


class Tally:
    """What a run has sent so far, what it took to reach each target accuracy, and the faults of its clients."""

    def __init__(self, targets: Sequence[float]) -> None:
        self._bytes_total = 0
        self._faults: Counter[str] = Counter()
        self._waiting = sorted(targets)

    def after(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Count a round; returns the bytes so far and the costs of the targets that it is the first to reach."""
        self._bytes_total += int(metrics["bytes/down"] + metrics["bytes/up"])
        accuracy = metrics.get("eval/accuracy", -math.inf)
        found = [target for target in self._waiting if target <= accuracy]
        self._waiting = [target for target in self._waiting if target > accuracy]
        new = {"bytes/total": float(self._bytes_total)}
        known = {**metrics, **new}
        costs = {name: known[source] for name, source in COSTS.items() if source in known}
        return new | {f"to_accuracy/{target:g}/{name}": cost for target in found for name, cost in costs.items()}

    def check_faults(self, allowed: FaultSection, number: int, records: Sequence[Record]) -> None:
        """Count the clients whose training went wrong.

        Raises:
            RoundError: there are more than the experiment allows; it names the client and what happened.
        """
        for record in records:
            if record.fault not in {"errors", "out_of_memory"}:
                continue
            self._faults[record.fault] += 1
            if self._faults[record.fault] > getattr(allowed, record.fault):
                raise RoundError(
                    f"round {number}: client {record.client!r} of profile {record.profile!r}: {record.refused}. "
                    f"faults.{record.fault} allows {getattr(allowed, record.fault)} such clients in a run, who are "
                    "then left out."
                )

    def progress(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {"bytes_total": self._bytes_total, "waiting": self._waiting, "faults": dict(self._faults)}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Put back what :meth:`progress` has returned."""
        self._bytes_total, self._waiting = progress["bytes_total"], list(progress["waiting"])
        self._faults = Counter(progress["faults"])


def _evaluated(experiment: Experiment, prepared: Prepared, executor: Executor) -> dict[str, float]:
    return total(executor.evaluate(prepared.shards, experiment.evaluation.batch_size))


def _answered(experiment: Experiment, prepared: Prepared, executor: Executor, number: int) -> dict[str, float]:
    """Ask the tasks that are due after a round."""
    due = [task for task in prepared.tasks if task.due(number, experiment.rounds)]
    shards = [shard for task in due for shard in task.shards]
    scores = iter(executor.answer(shards, experiment.evaluation.batch_size) if shards else ())
    metrics: dict[str, float] = {}
    for task in due:
        metrics |= task_metrics(task, [next(scores) for _ in task.shards])
    return metrics


def _client_scores(
    experiment: Experiment, prepared: Prepared, executor: Executor, *, personal: bool = False
) -> list[ClientScore]:
    """Score the global model, or each client's own, on clients' own examples, a client a shard."""
    by_id = {client.id: client for client in prepared.clients}
    shards = prepared.client_shards
    names = list(shards) if personal else None
    scores = executor.evaluate(list(shards.values()), experiment.evaluation.batch_size, names)
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
