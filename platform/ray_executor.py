"""Server and clients as Ray actors: one server, and a pool of client actors for each demand of the profiles.

Tensors never pass the driver: it hands object references from the server to the clients and back.
"""

import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import ModelSpec, tokenizer_of
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.deepspeed_build import check_installed
from fedloom.platform.errors import ServerLostError
from fedloom.platform.evaluation import Score
from fedloom.platform.experiment import Experiment, FaultSection
from fedloom.platform.population import NO_GROUPS, Chunk, Group, Resources
from fedloom.platform.quantization import check_quantization
from fedloom.platform.ray_clients import ClientActors, device_of
from fedloom.platform.ray_cluster import actors_per_pool, affordable, renamed, start_ray
from fedloom.platform.ray_crew import Call, Crew, Faults, Job, Slot
from fedloom.platform.ray_model import put_base_model
from fedloom.platform.ray_server import ask, start_server
from fedloom.platform.ray_training import CohortTraining
from fedloom.platform.record import Record
from fedloom.platform.sent import Snapshot
from fedloom.platform.tasks.answers import TaskScore
from fedloom.platform.tasks.questions import TaskShard
from fedloom.platform.wire import unpack_adapter
from fedloom.platform.worker import ClientWorker


class RayExecutor:
    """One server actor and pools of client actors, which outlive a run and serve the next one."""

    def __init__(
        self,
        spec: ModelSpec,
        data: FederatedData,
        pools: Sequence[Resources],
        groups: Mapping[Resources, Group] = NO_GROUPS,
        *,
        address: str | None = None,
        actors: int | None = None,
        worker: type[ClientWorker] = ClientWorker,
        share_model: bool = True,
        gpu_needs: Mapping[Resources, float] | None = None,
    ) -> None:
        """Start or join Ray, load the base model, then start the actors, which read its weights from shared memory.

        Args:
            spec: how to build the base model.
            data: what clients train on.
            pools: what their actors ask for.
            groups: the pools whose actors are groups of processes under DeepSpeed.
            address: the cluster to join; by default an embedded one is started.
            actors: client actors in each pool; by default as many as there is room for.
            worker: the class of the client actors, for measurements that replace the training.
            share_model: whether the base model is loaded once, and not by every actor, for measurements.
            gpu_needs: bytes that an actor of a pool trains in, see ``preparation.gpu_needs``; actors measure their
                GPU against it.

        Raises:
            ExperimentError: no cluster at the address, or one that is too small.
            ModelError: the base model cannot be loaded.
            MachineError: it lacks a device or a package that the experiment needs.
        """
        self._owns_ray = start_ray(address)
        self._spec = spec
        self._update_bytes = 0  # of the largest update of the last round
        self._faults = Faults(FaultSection())
        self._tokenizer: partial[Any] | None = None
        self._server: Any = None
        self._crew: Crew | None = None
        try:
            for pool in pools:  # before an actor is started
                check_quantization(
                    spec.quantization, device_of(dict(affordable(pool))["num_gpus"]), here=self._owns_ray
                )
            if groups and self._owns_ray:
                check_installed()
            counts = actors_per_pool(
                {pool: affordable(pool) for pool in pools},
                renamed(ray.cluster_resources()),
                renamed(ray.available_resources()),
                exactly=actors,
            )
            self._server = start_server()
            self._clients = ClientActors(
                spec=spec,
                data=ray.put(data),
                base=put_base_model(spec) if share_model and set(pools) - set(groups) else None,
                worker=worker,
                groups=groups,
                gpu_needs=gpu_needs or {},
            )
            self._crew = Crew(self._start_client, counts)
        except BaseException:
            self.close()
            raise

    def _start_client(self, pool: Resources) -> Any:
        return self._clients.start(pool)  # with the data of that moment, which may be others than the first

    @property
    def crew(self) -> Crew:
        """The client actors."""
        assert self._crew is not None, "the executor is closed"
        return self._crew

    @property
    def num_actors(self) -> dict[Resources, int]:
        """The number of client actors by pool."""
        return {pool: len(self.crew.of(pool)) for pool in {slot.pool for slot in self.crew.slots}}

    def use(self, data: FederatedData) -> None:
        """Train on other data from now on, on the actors that are there and on those that take their place."""
        self._clients = replace(self._clients, data=ray.put(data))
        for slot in self.crew.slots:
            slot.actor.use.remote(self._clients.data)  # what comes after it comes after it on the actor too

    def begin(self, experiment: Experiment, shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Start a run: a new state on the server, and a new server if the last one was lost."""
        self._faults = Faults(experiment.faults)
        heads: list[Any] = []
        wanted = [experiment.seed]

        def take(slot: Slot) -> Call[int] | None:
            if not wanted:
                return None
            seed = wanted.pop()
            return Call(slot=slot, generation=slot.generation, work=seed, done=slot.actor.initial_head.remote(seed))

        self.crew.work(
            Job(
                take=take,
                finished=lambda call, head: heads.append(head),
                returned=lambda call: wanted.append(call.work),
                left=lambda pool: bool(wanted),
            ),
            self._faults,
        )
        given = (experiment, dict(shapes), rank, heads[0], uuid.uuid4().hex)
        try:
            self._asked("begin", *given)
        except ServerLostError:
            self._server = start_server()
            self._asked("begin", *given)

    def train(self, chunks: Sequence[Chunk]) -> list[Record]:
        """Train the cohort; the server folds partials as they arrive."""
        records = CohortTraining(chunks, self._server, self.crew, update_bytes=self._update_bytes).run(self._faults)
        self._update_bytes = max((record.bytes_up for record in records), default=0)
        return records

    def finish(self, num_chunks: int) -> dict[str, float]:
        """Close the round on the server."""
        ranks: dict[str, float] = self._asked("finish", num_chunks)
        return ranks

    def evaluate(
        self, shards: Sequence[np.ndarray], batch_size: int, clients: Sequence[str] | None = None
    ) -> list[Score]:
        """Score the global model, or each client's own: shards go to whichever actor is free."""
        return self._measured("score", shards, batch_size, clients)

    def answer(self, shards: Sequence[TaskShard], batch_size: int) -> list[TaskScore]:
        """Let the global model answer questions: shards go to whichever actor is free."""
        if self._tokenizer is None and any(shard.generates for shard in shards):
            self._tokenizer = partial(ray.get, ray.put(tokenizer_of(self._spec)))
        return self._measured("answer", shards, batch_size, None, self._tokenizer)

    def _measured(
        self,
        question: str,
        shards: Sequence[Any],
        batch_size: int,
        clients: Sequence[str] | None,
        *others: Any,
    ) -> list[Any]:
        """Ask the client actors about the global model, or the clients'; results are in the order of the shards."""
        adapter = None if clients is not None else self._server.export.remote()
        waiting = deque(enumerate(shards))
        results: dict[int, Any] = {}

        def take(slot: Slot) -> Call[tuple[int, Any]] | None:
            if not waiting:
                return None
            index, shard = waiting.popleft()
            model = adapter if clients is None else self._server.export_personal.remote(clients[index])
            done = getattr(slot.actor, question).remote(model, shard, batch_size, *others)
            return Call(slot=slot, generation=slot.generation, work=(index, shard), done=done)

        def finished(call: Call[tuple[int, Any]], result: Any) -> None:
            results[call.work[0]] = result

        def returned(call: Call[tuple[int, Any]]) -> None:
            self._asked("ping")
            waiting.append(call.work)

        job = Job(take=take, finished=finished, returned=returned, left=lambda pool: bool(waiting))
        self.crew.work(job, self._faults)
        return [results[index] for index in range(len(shards))]

    def snapshot(self, since: int) -> Snapshot:
        """Return the server's state after a round."""
        snapshot: Snapshot = self._asked("snapshot", since)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Put the server back to a snapshot."""
        self._asked("restore", snapshot)

    def export(self) -> Adapter:
        """Return the global model as one adapter."""
        return unpack_adapter(self._asked("export"))

    def close(self) -> None:
        """Kill the actors; shut Ray down if it was started here."""
        if not ray.is_initialized():
            return
        if self._crew is not None:
            self._crew.close()
        if self._server is not None:
            ray.kill(self._server, no_restart=True)
        if self._owns_ray:
            ray.shutdown()

    def _asked(self, question: str, *arguments: Any) -> Any:
        return ask(self._server, question, *arguments)
