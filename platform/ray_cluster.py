"""The Ray cluster: joining or starting it, and how many actors it holds."""

import math
import os
from collections.abc import Mapping, Sequence

import ray

from fedloom.platform.errors import ExperimentError
from fedloom.platform.population import Resources

GIB = 2**30


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


def cluster_nodes(address: str) -> list[dict[str, float]]:
    """Return the resources of the cluster's nodes, under the names of a profile.

    Raises:
        ExperimentError: no cluster answers at the address.
    """
    start_ray(address)
    try:
        return [renamed(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def fitting(demand: Resources, node: Mapping[str, float]) -> int:
    """Return how many actors with this demand a node holds if it holds no others."""
    return min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in demand if amount > 0), default=0)


def affordable(pool: Resources) -> Resources:
    """Return the demand without GPUs where the cluster has none: the same experiment then runs on CPUs."""
    if ray.cluster_resources().get("GPU", 0.0) > 0:
        return pool
    return tuple((name, 0.0 if name == "num_gpus" else amount) for name, amount in pool)


def renamed(resources: Mapping[str, float]) -> dict[str, float]:
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
