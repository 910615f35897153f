"""The Ray cluster: joining or starting it, and how many actors it holds."""

import ipaddress
import math
import os
import secrets
import socket
from collections.abc import Mapping, Sequence

import ray
from ray._private import ray_constants

from fedloom.platform.errors import ExperimentError
from fedloom.platform.interrupts import sigterm_kept
from fedloom.platform.population import Resources
from fedloom.platform.ray_tokens import TOKEN_HELP, choose_tokens

GIB = 2**30
REACH_TIMEOUT_S = 10.0


def start_ray(address: str | None) -> bool:
    """Join the cluster at ``address``, or start an embedded one. Returns whether it was started here.

    An embedded cluster listens on 127.0.0.1 alone and asks for a token that this process has drawn.

    Raises:
        ExperimentError: no cluster answers at the address, or it asks for a token that is not there or is another; or
            an embedded one does not come up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # From Ray 2.60 on: keep accelerators visible to actors that ask for none, as Ray itself is about to.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default Ray gives memory back once a second: the partials of a whole round would lie in its object store, and
    # every one of them in pages that were never touched before.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "20")
    if ray.is_initialized():
        return False
    choose_tokens()
    # Ray puts the machine's own address in the place of 127.0.0.1, and then listens on every interface, unless it
    # believes that it runs on a system where clusters of several machines are not supported.
    ray_constants.ENABLE_RAY_CLUSTER = not _stays_here(address)
    with sigterm_kept():  # Ray would end this process at once, and nobody would be told how a run goes on
        if address is None:
            _start()
        else:
            _join(address)
    return address is None


def _start() -> None:
    os.environ["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises the bare class when its processes do not come up
        raise ExperimentError(f"Ray could not be started on this machine: {error}") from error


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise ExperimentError(f"--address {address}: no Ray cluster answers there: {error}") from error
    # What answers and lets nobody in will not change its mind: one attempt in place of twenty.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ray.exceptions.AuthenticationError as error:
        raise ExperimentError(f"--address {address}: there is no token for this cluster. {TOKEN_HELP}") from error
    except ConnectionError as error:
        said = f"no Ray cluster answers there, or it asks for another token than this one: {error}. {TOKEN_HELP}"
        raise ExperimentError(f"--address {address}: {said}") from error
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(f"--address {address}: no Ray cluster answers there: {error}") from error


def _stays_here(address: str | None) -> bool:
    """Whether nothing but this machine is meant."""
    if address is None:
        return True
    if address == "auto":  # Ray tells a job its cluster's address
        address = os.environ.get("RAY_ADDRESS", address)
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or "auto"
        return False


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
