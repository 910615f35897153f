"""Where clients run: a cluster of three kinds of node on this machine, and profiles that pin clients to a kind each.

    python tests/placement.py

The head has no CPUs. The GPU of one node is declared and not real: its actors are placed as on a GPU and compute on the
CPU. The table is read from the records of the rounds, as it can be from `ledger.parquet` of any run.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform import ray_executor
from fedloom.platform.driver import run
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble

# What each node declares beside one CPU, and what the profile that is pinned to it asks for.
NODES = {"gpu-server": {"num_gpus": 1}, "workstation": {"resources": {"rtx": 2}}, "phone": {"resources": {"npu": 1}}}
PROFILES = (
    {"name": "large", "share": 2, "rank": 8, "num_cpus": 0.5, "num_gpus": 0.5},
    {"name": "medium", "share": 1, "rank": 4, "num_cpus": 1, "resources": {"rtx": 2}},
    {"name": "small", "share": 3, "rank": 2, "num_cpus": 1, "resources": {"npu": 1}},
)

QUIET = {"include_dashboard": False, "include_log_monitor": False}  # processes that nobody here needs


def played(experiment, prepared):
    """Run the experiment on the cluster that this process has joined; returns rounds, adapter and its actors."""
    ray_executor._device = lambda num_gpus: "cpu"
    executor = ray_executor.RayExecutor(prepared.spec, prepared.data, pools_of(experiment))
    try:
        rounds = list(run(experiment, prepared, executor))
        actors = ray.get([slot.actor.__ray_call__.remote(seen) for slot in executor.crew.slots])
        return rounds, executor.export(), actors
    finally:
        executor.close()


def seen(worker):
    """Say what an actor sees: its node, what Ray granted it, its GPU, and where the memory of its weights is."""
    context = ray.get_runtime_context()
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    weights = {
        name: (parameter.nbytes, *memory_of(parameter.data_ptr()))
        for name, parameter in worker._host.model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    return {
        "node": names[context.get_node_id()],
        "granted": context.get_assigned_resources(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "weights": weights,
    }


def memory_of(address):
    """Return what this process has mapped at an address: name, inode, and the offset in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *name = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return (name or [""])[0], int(inode), int(offset, 16) + address - first
    raise ValueError(f"nothing is mapped at {address:#x}")


def placed(rounds):
    """Count the clients that were trained, by profile and node."""
    return Counter((record.profile, record.node) for done in rounds for record in done.records)


def main():
    """Print the table; with `--facts`, also write what a test looks at."""
    parser = argparse.ArgumentParser(description="Where clients run.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--facts", type=Path)
    options = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **QUIET})
    try:
        for name, declared in NODES.items():
            cluster.add_node(wait=False, num_cpus=1, node_name=name, **declared, **QUIET)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            llama = save_llama(Path(folder) / "llama")
            experiment = make_experiment(
                llama,
                rounds=options.rounds,
                population={"profiles": PROFILES},
                method={"name": "flexlora"},
                cohort={"size": 6},
            )
            rounds, adapter, actors = played(experiment, assemble(experiment, make_data()))
            local, expected = finished(experiment)
        ray.shutdown()
    finally:
        cluster.shutdown()
    print("| profile | node | clients trained |\n|---|---|---|")
    for (profile, node), count in sorted(placed(rounds).items()):
        print(f"| {profile} | {node} | {count} |")
    same = all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in adapter.tensors().items())
    print(f"adapter as of a run in one process: {'equal' if same else 'DIFFERENT'}")
    if options.facts is not None:
        profiles = Counter(record.profile for done in local for record in done.records)
        facts = {"placed": [[*key, n] for key, n in placed(rounds).items()], "actors": actors, "same": same}
        options.facts.write_text(json.dumps(facts | {"profiles": profiles}))


if __name__ == "__main__":
    main()
