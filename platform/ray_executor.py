"""Server and clients as Ray actors: one server, and a pool of client actors for each demand of the profiles.

Tensors never pass the driver: it hands object references from the server to the clients and back.
"""

import math
import os
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.errors import ExperimentError, RoundError
from fedloom.platform.evaluation import Score
from fedloom.platform.executor import SERVER_THREADS
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import Chunk, Resources, threads_of
from fedloom.platform.server import Server, Snapshot
from fedloom.platform.wire import unpack_adapter
from fedloom.platform.worker import ClientWorker, Record

CALLS_IN_FLIGHT = 2  # the next call's dispatches are made while an actor still trains
CALL_BYTES = 2**20  # of updates that a call of several chunks returns at most: beyond it copies cost more than calls
GIB = 2**30
Result = TypeVar("Result")


def start_ray(address: str | None) -> bool:
    """Join the cluster at ``address``, or start an embedded one. Returns whether it was started here.

    Raises:
        ExperimentError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Ray warns of its choice of authentication unless it is made for it; this cluster lives and dies with the run.
        os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE") or "disabled"
    # From Ray 2.60 on: keep accelerators visible to actors that ask for none, as Ray itself is about to.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default Ray gives memory back once a second: the partials of a whole round would lie in its object store, and
    # every one of them in pages that were never touched before.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "20")
    if ray.is_initialized():
        return False
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"--address {address}: no Ray cluster answers there: {error}") from error
    return address is None


def actors_per_pool(
    demands: Mapping[Resources, Resources],
    total: Mapping[str, float],
    free: Mapping[str, float],
    *,
    exactly: int | None = None,
) -> dict[Resources, int]:
    """Say how many actors each pool gets: one each, then one more in turn as long as free resources last.

    The first of each pool only has to fit the whole cluster: where others use it now, Ray lets that actor wait.

    Args:
        demands: what an actor of each pool asks for on this cluster.
        total: the cluster's resources.
        free: those that nobody uses now.
        exactly: the number in each pool, in place of the above.

    Raises:
        ExperimentError: the pools do not fit the cluster together; the message gives the arithmetic.
    """
    capacity, left = dict(total), dict(free)
    counts = dict.fromkeys(demands, exactly or 1)
    first = [demands[pool] for pool, count in counts.items() for _ in range(count)]
    if not all(_take(capacity, demand) for demand in first):
        needed = _sum_of(first)
        raise ExperimentError(
            f"key population.profiles: the pools need {_words(needed)} at once but the cluster has "
            f"{_words({name: total.get(name, 0.0) for name in needed})}. "
            "Ask for less (e.g. num_cpus: 0.5) or let profiles ask for the same, so that they share actors."
        )
    growing = [] if exactly or not all(_take(left, demand) for demand in demands.values()) else list(demands)
    while growing:
        growing = [pool for pool in growing if _take(left, demands[pool])]
        for pool in growing:
            counts[pool] += 1
    return counts


class RayExecutor:
    """One server actor and pools of client actors, which outlive a run and serve the next one."""

    def __init__(
        self,
        spec: ModelSpec,
        data: FederatedData,
        pools: Sequence[Resources],
        *,
        address: str | None = None,
        actors: int | None = None,
        worker: type[ClientWorker] = ClientWorker,
    ) -> None:
        """Start or join Ray, then start the actors; each loads the base model once.

        Args:
            spec: how to build the base model.
            data: what clients train on.
            pools: what their actors ask for.
            address: the cluster to join; by default an embedded one is started.
            actors: client actors in each pool; by default as many as there is room for.
            worker: the class of the client actors, for measurements that replace the training.

        Raises:
            ExperimentError: no cluster at the address, or one that is too small.
        """
        self._owns_ray = start_ray(address)
        self._worker = worker
        self._update_bytes = 0  # of the largest update of the last round
        self._actors: dict[Resources, list[Any]] = {}
        try:
            counts = actors_per_pool(
                {pool: _affordable(pool) for pool in pools},
                _renamed(ray.cluster_resources()),
                _renamed(ray.available_resources()),
                exactly=actors,
            )
            self._server = ray.remote(Server).options(num_cpus=0).remote(threads=SERVER_THREADS, share=ray.put)
            self._data = ray.put(data)
            for pool in pools:
                self._actors[pool] = [self._start_client(spec, pool) for _ in range(counts[pool])]
        except BaseException:
            self.close()
            raise

    def _start_client(self, spec: ModelSpec, pool: Resources) -> Any:
        demand = dict(_affordable(pool))
        gpus = demand.pop("num_gpus")
        memory = demand.pop("memory_gib", None)
        return (
            ray.remote(self._worker)
            .options(
                num_cpus=demand.pop("num_cpus"),
                num_gpus=gpus,
                memory=None if memory is None else int(memory * GIB),
                resources=demand or None,
            )
            .remote(spec, self._data, device=_device(gpus), threads=threads_of(pool), fetch=ray.get)
        )

    @property
    def num_actors(self) -> dict[Resources, int]:
        """The number of client actors by pool."""
        return {pool: len(actors) for pool, actors in self._actors.items()}

    def begin(self, experiment: Experiment, shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Start a run: a new state on the server."""
        head = self._any_client().initial_head.remote(experiment.seed)
        _get(self._server.begin.remote(experiment, dict(shapes), rank, head, uuid.uuid4().hex))

    def train(self, chunks: Sequence[Chunk]) -> list[Record]:
        """Train the cohort: every actor has two calls at most, the server folds partials as they arrive.

        Where there are many more chunks than actors, the first calls take several, so that Ray's own time per call
        is paid less often. Chunks stay what is folded, so that the bits know nothing of calls.
        """
        queues = {pool: deque(chunk for chunk in chunks if chunk.pool == pool) for pool in self._actors}
        records: dict[int, list[Record]] = {}
        busy: dict[Any, tuple[Any, list[Chunk], Any]] = {}

        def submit(actor: Any, pool: Resources) -> None:
            taken = self._next_call(queues[pool], len(self._actors[pool]))
            if taken:
                sent = self._server.dispatch_all.remote(taken)
                partials, done = actor.train_all.options(num_returns=2).remote(sent)
                busy[done] = (actor, taken, partials)

        for _ in range(CALLS_IN_FLIGHT):
            for pool, actors in self._actors.items():
                for actor in actors:
                    submit(actor, pool)
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor, taken, partials = busy.pop(done)
            self._server.fold_all.remote([chunk.index for chunk in taken], partials)
            records |= zip([chunk.index for chunk in taken], _get(done), strict=True)
            submit(actor, taken[0].pool)
        every = [record for index in sorted(records) for record in records[index]]
        self._update_bytes = max((record.bytes_up for record in every), default=0)
        return every

    def _next_call(self, queue: deque[Chunk], num_actors: int) -> list[Chunk]:
        """Take the chunks of one call: a fair share of half of what waits, within ``CALL_BYTES``, at least one."""
        share = len(queue) // (CALLS_IN_FLIGHT * num_actors)
        most = CALL_BYTES // self._update_bytes if self._update_bytes else 1
        return [queue.popleft() for _ in range(min(len(queue), max(1, min(share, most))))]

    def finish(self, num_chunks: int) -> dict[str, float]:
        """Close the round on the server."""
        ranks: dict[str, float] = _get(self._server.finish.remote(num_chunks))
        return ranks

    def evaluate(self, shards: Sequence[np.ndarray], batch_size: int) -> list[Score]:
        """Score the global model: shards go to whichever actor is free."""
        adapter = self._server.export.remote()
        waiting = deque(enumerate(shards))
        scores: dict[int, Score] = {}
        busy: dict[Any, tuple[Any, int]] = {}

        def submit(actor: Any) -> None:
            if waiting:
                index, shard = waiting.popleft()
                busy[actor.score.remote(adapter, shard, batch_size)] = (actor, index)

        for actors in self._actors.values():
            for actor in actors:
                submit(actor)
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor, index = busy.pop(done)
            scores[index] = _get(done)
            submit(actor)
        return [scores[index] for index in range(len(shards))]

    def snapshot(self, since: int) -> Snapshot:
        """Return the server's state after a round."""
        snapshot: Snapshot = _get(self._server.snapshot.remote(since))
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Put the server back to a snapshot."""
        _get(self._server.restore.remote(snapshot))

    def export(self) -> Adapter:
        """Return the global model as one adapter."""
        return unpack_adapter(_get(self._server.export.remote()))

    def close(self) -> None:
        """Kill the actors; shut Ray down if it was started here."""
        if not ray.is_initialized():
            return
        for actor in [*(actor for actors in self._actors.values() for actor in actors), getattr(self, "_server", None)]:
            if actor is not None:
                ray.kill(actor, no_restart=True)
        self._actors = {}
        if self._owns_ray:
            ray.shutdown()

    def _any_client(self) -> Any:
        return next(iter(self._actors.values()))[0]


def cluster_nodes(address: str) -> list[dict[str, float]]:
    """Return the resources of the cluster's nodes, under the names of a profile.

    Raises:
        ExperimentError: no cluster answers at the address.
    """
    start_ray(address)
    try:
        return [_renamed(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def fitting(demand: Resources, node: Mapping[str, float]) -> int:
    """Return how many actors with this demand a node holds if it holds no others."""
    return min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in demand if amount > 0), default=0)


def _get(reference: Any) -> Any:
    """Fetch a result; what the platform raised in an actor is raised here as it was, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise RoundError(f"an actor of this run has died: {error}") from error


def _device(num_gpus: float) -> str:
    return "cuda" if num_gpus > 0 else "cpu"


def _affordable(pool: Resources) -> Resources:
    """Return the demand without GPUs where the cluster has none: the same experiment then runs on CPUs."""
    if ray.cluster_resources().get("GPU", 0.0) > 0:
        return pool
    return tuple((name, 0.0 if name == "num_gpus" else amount) for name, amount in pool)


def _renamed(resources: Mapping[str, float]) -> dict[str, float]:
    """Return Ray's resources under the names of a profile, memory in GiB."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    renamed = {names.get(name, name): amount for name, amount in resources.items() if name != "memory"}
    return renamed | {"memory_gib": resources.get("memory", 0.0) / GIB}


def _sum_of(demands: Sequence[Resources]) -> dict[str, float]:
    total: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand:
            total[name] = total.get(name, 0.0) + amount
    return {name: amount for name, amount in total.items() if amount > 0}


def _take(left: dict[str, float], demand: Resources) -> bool:
    """Take a demand from what is left, if it fits."""
    wanted = {name: amount for name, amount in demand if amount > 0}
    if any(left.get(name, 0.0) < amount - 1e-9 for name, amount in wanted.items()):
        return False
    for name, amount in wanted.items():
        left[name] -= amount
    return True


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {math.floor(amount * 100) / 100:g}" for name, amount in sorted(resources.items()))
