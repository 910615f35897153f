"""Where clients run: a cluster of three kinds of node on this machine, and profiles that pin clients to a kind each.

    python -m benchmarks.placement

The head has no CPUs. The GPU of one node is declared and not real: its actors are placed as on a GPU. Clients train
nothing, so that the whole takes little longer than its processes to start. The table is read from the clients' records,
as it can be from `ledger.parquet` of any run.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks.engine import NO_MODEL, NullWorker, shapes_for
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, clients_of, pools_of, tasks_of
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.record import Record

# What each node declares beside one CPU, and what the profile that is pinned to it asks for.
NODES: dict[str, dict[str, Any]] = {
    "gpu-server": {"num_gpus": 1},
    "workstation": {"resources": {"rtx": 2}},
    "phone": {"resources": {"npu": 1}},
}
PROFILES = (
    {"name": "large", "share": 2, "rank": 8, "num_cpus": 0.5, "num_gpus": 0.5},
    {"name": "medium", "share": 1, "rank": 4, "num_cpus": 1, "resources": {"rtx": 2}},
    {"name": "small", "share": 3, "rank": 2, "num_cpus": 1, "resources": {"npu": 1}},
)
NUM_CLIENTS = 12
QUIET = {"include_dashboard": False, "include_log_monitor": False}  # processes that nobody here needs


def started() -> Cluster:
    """Start the head and the nodes, and join them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **QUIET})
    for name, declared in NODES.items():
        cluster.add_node(wait=False, num_cpus=1, node_name=name, **declared, **QUIET)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    return cluster


def played(rounds: int) -> tuple[list[Record], list[dict[str, Any]], bool]:
    """Play rounds of all clients; returns their records, what Ray granted each actor, if the server is the driver's."""
    experiment = Experiment.model_validate(
        {
            "population": {"profiles": PROFILES},
            "cohort": {"size": NUM_CLIENTS},
            "method": {"name": "flexlora"},
            "chunk_size": 1,
        }
    )
    clients, shapes = clients_of(experiment, {f"c{i}": 10 for i in range(NUM_CLIENTS)}), shapes_for(0.1)
    chunks = chunks_of(experiment, tasks_of(experiment, clients, shapes))
    executor = RayExecutor(
        NO_MODEL,
        None,  # type: ignore[arg-type]
        pools_of(experiment),
        worker=NullWorker,
        share_model=False,
    )
    try:
        executor.begin(experiment, shapes, max(client.rank for client in clients))
        records = []
        for _ in range(rounds):
            records += executor.train(chunks)
            executor.finish(len(chunks))
        actors: list[dict[str, Any]] = ray.get(
            [slot.actor.__ray_call__.remote(granted) for slot in executor.crew.slots]
        )
        server = ray.get(executor._server.__ray_call__.remote(node))
        return records, actors, server == node(None)
    finally:
        executor.close()


def node(_: object) -> str:
    """Return the id of the node of whoever asks."""
    return str(ray.get_runtime_context().get_node_id())


def granted(_: object) -> dict[str, Any]:
    """Return what Ray has granted the actor that asks, and the GPUs that it sees."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return {"resources": resources, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}


def placed(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    """Count the clients that were trained, by profile and node."""
    return Counter((record.profile, record.node) for record in records)


def main() -> None:
    """Print the table; with `--facts`, also write what a test looks at."""
    parser = argparse.ArgumentParser(description="Where clients run.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--facts", type=Path)
    options = parser.parse_args()
    cluster = started()
    try:
        records, actors, beside = played(options.rounds)
        ray.shutdown()
    finally:
        cluster.shutdown()
    print("| profile | node | clients trained |\n|---|---|---|")
    counts = sorted(placed(records).items())
    for (profile, node), count in counts:
        print(f"| {profile} | {node} | {count} |")
    if options.facts is not None:
        rows = [[*where, count] for where, count in counts]
        facts = {"placed": rows, "actors": actors, "server_beside_driver": beside}
        options.facts.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
