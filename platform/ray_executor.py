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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import ModelSpec, tokenizer_of
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.deepspeed_build import check_installed
from fedloom.platform.deepspeed_worker import DeepSpeedWorker
from fedloom.platform.errors import ServerLostError
from fedloom.platform.evaluation import Score
from fedloom.platform.executor import SERVER_THREADS
from fedloom.platform.experiment import Experiment, FaultSection
from fedloom.platform.gpu_memory import GpuNeed
from fedloom.platform.population import NO_GROUPS, Chunk, Group, Resources, threads_of
from fedloom.platform.quantization import check_quantization
from fedloom.platform.ray_cluster import GIB, actors_per_pool, affordable, renamed, start_ray
from fedloom.platform.ray_crew import CALLS_IN_FLIGHT, LOST, Call, Crew, Faults, Job, Slot
from fedloom.platform.ray_model import put_base_model
from fedloom.platform.record import Record
from fedloom.platform.sent import Snapshot
from fedloom.platform.server import Server
from fedloom.platform.tasks.answers import TaskScore
from fedloom.platform.tasks.questions import TaskShard
from fedloom.platform.wire import unpack_adapter
from fedloom.platform.worker import ClientWorker

CALL_BYTES = 2**20  # of updates that a call of several chunks returns at most: beyond it copies cost more than calls


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
        self._groups = groups
        self._worker = worker
        self._gpu_needs = dict(gpu_needs or {})
        self._update_bytes = 0  # of the largest update of the last round
        self._faults = Faults(FaultSection())
        self._tokenizer: partial[Any] | None = None
        self._server: Any = None
        self._crew: Crew | None = None
        try:
            for pool in pools:  # before an actor is started
                check_quantization(spec.quantization, _device(dict(affordable(pool))["num_gpus"]), here=self._owns_ray)
            if groups and self._owns_ray:
                check_installed()
            counts = actors_per_pool(
                {pool: affordable(pool) for pool in pools},
                renamed(ray.cluster_resources()),
                renamed(ray.available_resources()),
                exactly=actors,
            )
            self._start_server()
            self._data = ray.put(data)
            self._base = put_base_model(spec) if share_model and set(pools) - set(groups) else None
            self._crew = Crew(self._start_client, counts)
        except BaseException:
            self.close()
            raise

    def _start_server(self) -> None:
        """On the driver's node: a node that is lost takes clients with it, and the server only with the driver."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        server = ray.remote(Server).options(num_cpus=0, scheduling_strategy=here)
        self._server = server.remote(threads=SERVER_THREADS, share=ray.put)

    def _start_client(self, pool: Resources) -> Any:
        demand = dict(affordable(pool))
        gpus = demand.pop("num_gpus")
        memory = demand.pop("memory_gib", None)
        group = self._groups.get(pool)
        own: dict[str, Any] = {"base": self._base, "gpu": self._gpu_need(pool, gpus)}
        if group is not None:  # its processes load the base model themselves, cut up
            own = {"group": group}
        return (
            ray.remote(self._worker if group is None else DeepSpeedWorker)
            .options(
                num_cpus=demand.pop("num_cpus"),
                num_gpus=gpus,
                memory=None if memory is None else int(memory * GIB),
                resources=demand or None,
            )
            .remote(self._spec, self._data, device=_device(gpus), threads=threads_of(pool), fetch=ray.get, **own)
        )

    def _gpu_need(self, pool: Resources, num_gpus: float) -> GpuNeed | None:
        if _device(num_gpus) != "cuda" or pool not in self._gpu_needs:
            return None
        return GpuNeed(num_gpus=num_gpus, need_bytes=self._gpu_needs[pool])

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
        self._data = ray.put(data)
        for slot in self.crew.slots:
            slot.actor.use.remote(self._data)  # what comes after it comes after it on the actor too

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
            self._start_server()
            self._asked("begin", *given)

    def train(self, chunks: Sequence[Chunk]) -> list[Record]:
        """Train the cohort: every actor has two calls at most, the server folds partials as they arrive.

        Where there are many more chunks than actors, the first calls take several, so that Ray's own time per call
        is paid less often. Chunks stay what is folded, so that the bits know nothing of calls, nor of actors that die.
        """
        queues = {slot.pool: deque(c for c in chunks if c.pool == slot.pool) for slot in self.crew.slots}
        records: dict[int, list[Record]] = {}
        folds: dict[Any, list[Chunk]] = {}
        retries = dict.fromkeys((chunk.index for chunk in chunks), 0)

        def take(slot: Slot) -> Call[list[Chunk]] | None:
            taken = self._next_call(queues[slot.pool], len(self.crew.of(slot.pool)))
            if not taken:
                return None
            sent = self._server.dispatch_all.remote(taken)
            partials, done = slot.actor.train_all.options(num_returns=2).remote(sent)
            return Call(slot=slot, generation=slot.generation, work=taken, done=done, partials=partials, node=slot.node)

        def finished(call: Call[list[Chunk]], value: list[list[Record]]) -> None:
            indices = [chunk.index for chunk in call.work]
            folds[self._server.fold_all.remote(indices, call.partials)] = call.work
            for index, done in zip(indices, value, strict=True):
                records[index] = [replace(record, node=call.node) for record in done]

        def again(work: list[Chunk]) -> None:
            self._asked("ping")  # if the server is gone, there is nobody to do it again for
            for chunk in work:
                retries[chunk.index] += 1
            queues[work[0].pool].extendleft(reversed(work))

        while True:
            self.crew.work(
                Job(
                    take=take,
                    finished=finished,
                    returned=lambda call: again(call.work),
                    left=lambda pool: bool(queues[pool]),
                ),
                self._faults,
            )
            unfolded = [work for fold, work in folds.items() if not _arrived(fold)]
            if not unfolded:
                break
            folds.clear()  # updates whose node was lost on their way to the server
            for work in unfolded:
                self._faults.count("infrastructure", "updates were lost with their node")
                again(work)
        every = [
            replace(record, retries=retries[index]) if retries[index] else record
            for index in sorted(records)
            for record in records[index]
        ]
        self._update_bytes = max((record.bytes_up for record in every), default=0)
        return every

    def _next_call(self, queue: deque[Chunk], num_actors: int) -> list[Chunk]:
        """Take the chunks of one call: a fair share of half of what waits, within ``CALL_BYTES``, at least one."""
        share = len(queue) // (CALLS_IN_FLIGHT * num_actors)
        most = CALL_BYTES // self._update_bytes if self._update_bytes else 1
        return [queue.popleft() for _ in range(min(len(queue), max(1, min(share, most))))]

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
        """Call a method of the server. What it raises is raised here as it was, without Ray's wrapping.

        Raises:
            ServerLostError: the server is gone.
        """
        try:
            return ray.get(getattr(self._server, question).remote(*arguments))
        except LOST as error:
            raise _server_lost(error) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


def _server_lost(error: BaseException) -> ServerLostError:
    return ServerLostError(f"the server actor of this run was lost: {' '.join(str(error).split())[:300]}")


def _arrived(fold: Any) -> bool:
    """Whether a fold was made; ``False`` if what it was to read is gone."""
    try:
        ray.get(fold)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise _server_lost(error) from error
    except LOST:
        return False
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LOST):
            return False
        raise error.cause from error
    return True


def _device(num_gpus: float) -> str:
    return "cuda" if num_gpus > 0 else "cpu"
