"""A run on two nodes of which one disappears and is not replaced: its actor waits for a place, the other does the work.

    python tests/lost_node.py                         # or: make chaos

The cluster has a head without CPUs and two nodes with one CPU each, all on this machine. The adapter and the metrics
must be those of a run in one process.
"""

import tempfile
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from small import finished, make_experiment, save_llama
from test_faults import DATA, assert_same, played

from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_executor import RayExecutor


def main():
    """Lose a node after the first of four rounds."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()

        def lose_a_node(executor, done):
            if done.number == 1:
                cluster.remove_node(nodes[0], allow_graceful=False)

        with tempfile.TemporaryDirectory() as folder:
            experiment = make_experiment(save_llama(Path(folder) / "llama"), method={"name": "flexlora"}, rounds=4)
            spec = assemble(experiment, DATA).spec
            executor = RayExecutor(spec, DATA, pools_of(experiment), actors=2)
            assert_same(played(executor, experiment, disturb=lose_a_node), finished(experiment))
    finally:
        ray.shutdown()  # first: a cluster does not end under its driver
        cluster.shutdown()
    print("a lost node has left no trace: adapter and metrics equal")


if __name__ == "__main__":
    main()
