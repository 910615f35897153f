"""How client actors are started: what Ray reserves for one, and what it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from fedloom.platform.base_model import ModelSpec
from fedloom.platform.deepspeed_worker import DeepSpeedWorker
from fedloom.platform.gpu_memory import GpuNeed
from fedloom.platform.population import Group, Resources, threads_of
from fedloom.platform.ray_cluster import GIB, affordable
from fedloom.platform.worker import ClientWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientActors:
    """What all client actors of an executor have in common.

    Attributes:
        spec: how to build the base model.
        data: the reference of what clients train on.
        base: the reference of the base model, or ``None`` where every actor loads it for itself.
        worker: the class of an actor.
        groups: the pools whose actors are groups of processes under DeepSpeed.
        gpu_needs: bytes that an actor of a pool trains in, where its GPU is measured against them.
    """

    spec: ModelSpec
    data: Any
    base: Any
    worker: type[ClientWorker]
    groups: Mapping[Resources, Group]
    gpu_needs: Mapping[Resources, float]

    def start(self, pool: Resources) -> Any:
        """Start one actor of a pool."""
        demand = dict(affordable(pool))
        gpus = demand.pop("num_gpus")
        memory = demand.pop("memory_gib", None)
        group = self.groups.get(pool)
        own: dict[str, Any] = {"base": self.base, "gpu": self._gpu_need(pool, gpus)}
        if group is not None:  # its processes load the base model themselves, cut up
            own = {"group": group}
        return (
            ray.remote(self.worker if group is None else DeepSpeedWorker)
            .options(
                num_cpus=demand.pop("num_cpus"),
                num_gpus=gpus,
                memory=None if memory is None else int(memory * GIB),
                resources=demand or None,
            )
            .remote(self.spec, self.data, device=device_of(gpus), threads=threads_of(pool), fetch=ray.get, **own)
        )

    def _gpu_need(self, pool: Resources, num_gpus: float) -> GpuNeed | None:
        if device_of(num_gpus) != "cuda" or pool not in self.gpu_needs:
            return None
        return GpuNeed(num_gpus=num_gpus, need_bytes=self.gpu_needs[pool])


def device_of(num_gpus: float) -> str:
    """Return the device of an actor that has so many GPUs."""
    return "cuda" if num_gpus > 0 else "cpu"
