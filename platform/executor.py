"""Where a run's server and clients live: in this process, or as actors on a Ray cluster. Same rounds, same bits."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import ModelSpec, tokenizer_of
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.deepspeed_worker import DeepSpeedWorker
from fedloom.platform.evaluation import Score
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import NO_GROUPS, Chunk, Group, Resources, threads_of
from fedloom.platform.record import Record
from fedloom.platform.sent import Snapshot
from fedloom.platform.server import Server
from fedloom.platform.tasks.answers import TaskScore
from fedloom.platform.tasks.questions import TaskShard
from fedloom.platform.wire import unpack_adapter
from fedloom.platform.worker import ClientWorker

SERVER_THREADS = 1  # one everywhere: the bits of a sum or an SVD may depend on it


class Executor(Protocol):
    """What the driver needs of the place where a run happens. One executor serves many runs, one after another."""

    def begin(self, experiment: Experiment, shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Start a run: a new state on the server."""

    def train(self, chunks: Sequence[Chunk]) -> list[Record]:
        """Train the cohort and fold its updates; returns the clients' records in chunk order."""

    def finish(self, num_chunks: int) -> dict[str, float]:
        """Close the round on the server; returns the ranks of the new global model."""

    def evaluate(
        self, shards: Sequence[np.ndarray], batch_size: int, clients: Sequence[str] | None = None
    ) -> list[Score]:
        """Score the global model, one result per shard; or, a client a shard, the named clients' own models."""

    def answer(self, shards: Sequence[TaskShard], batch_size: int) -> list[TaskScore]:
        """Let the global model answer questions, one result per shard."""

    def snapshot(self, since: int) -> Snapshot:
        """Return the server's state after a round, with the pieces of the patch from version ``since`` on."""

    def restore(self, snapshot: Snapshot) -> None:
        """Put the server back to a snapshot with all pieces, after ``begin``."""

    def export(self) -> Adapter:
        """Return the global model as one adapter."""

    def close(self) -> None:
        """Give back everything: no process, thread setting or actor is left."""


class LocalExecutor:
    """Server and clients in this process: for debugging, and the measure of what actors must reproduce."""

    def __init__(
        self,
        spec: ModelSpec,
        data: FederatedData,
        pools: Sequence[Resources],
        groups: Mapping[Resources, Group] = NO_GROUPS,
    ) -> None:
        """Load the base model once per device that the pools ask for, and start the processes of ``groups``."""
        self._threads_before = torch.get_num_threads()
        self._server = Server(threads=SERVER_THREADS)
        self._spec = spec
        self._runs = 0
        loaded: dict[tuple[str, int], ClientWorker] = {}
        self._workers: dict[Resources, ClientWorker | DeepSpeedWorker] = {}
        for pool in pools:
            device = "cuda" if dict(pool)["num_gpus"] > 0 and torch.cuda.is_available() else "cpu"
            if pool in groups:
                self._workers[pool] = DeepSpeedWorker(
                    spec, data, group=groups[pool], device=device, threads=threads_of(pool)
                )
                continue
            key = (device, threads_of(pool))
            if key not in loaded:
                loaded[key] = ClientWorker(spec, data, device=device, threads=threads_of(pool))
            self._workers[pool] = loaded[key]

    def begin(self, experiment: Experiment, shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Start a run: a new state on the server."""
        self._runs += 1
        head = next(iter(self._workers.values())).initial_head(experiment.seed)
        torch.set_num_threads(SERVER_THREADS)
        self._server.begin(experiment, shapes, rank, head, f"run-{self._runs}")

    def train(self, chunks: Sequence[Chunk]) -> list[Record]:
        """Train the cohort, chunk by chunk, and fold its updates."""
        records = []
        for chunk in chunks:
            torch.set_num_threads(SERVER_THREADS)
            sent = self._server.dispatch(chunk)
            partial, done = self._workers[chunk.pool].train(sent)
            torch.set_num_threads(SERVER_THREADS)
            self._server.fold(chunk.index, partial)
            records += done
        return records

    def finish(self, num_chunks: int) -> dict[str, float]:
        """Close the round on the server."""
        torch.set_num_threads(SERVER_THREADS)
        return self._server.finish(num_chunks)

    def evaluate(
        self, shards: Sequence[np.ndarray], batch_size: int, clients: Sequence[str] | None = None
    ) -> list[Score]:
        """Score the global model, or each client's own, shard by shard."""
        worker = next(iter(self._workers.values()))
        if clients is None:
            adapter = self._server.export()
            return [worker.score(adapter, shard, batch_size) for shard in shards]
        return [
            worker.score(self._server.export_personal(client), shard, batch_size)
            for client, shard in zip(clients, shards, strict=True)
        ]

    def answer(self, shards: Sequence[TaskShard], batch_size: int) -> list[TaskScore]:
        """Let the global model answer questions, shard by shard."""
        worker = next(iter(self._workers.values()))
        adapter = self._server.export()
        tokenizer = partial(tokenizer_of, self._spec) if any(shard.generates for shard in shards) else None
        return [worker.answer(adapter, shard, batch_size, tokenizer) for shard in shards]

    def snapshot(self, since: int) -> Snapshot:
        """Return the server's state after a round."""
        return self._server.snapshot(since)

    def restore(self, snapshot: Snapshot) -> None:
        """Put the server back to a snapshot."""
        self._server.restore(snapshot)

    def export(self) -> Adapter:
        """Return the global model as one adapter."""
        return unpack_adapter(self._server.export())

    def close(self) -> None:
        """Restore the process's number of threads, and end the processes that were started."""
        for worker in self._workers.values():
            if isinstance(worker, DeepSpeedWorker):
                worker.close()
        torch.set_num_threads(self._threads_before)
