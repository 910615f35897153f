"""Flower's simulation engine on the payload of `benchmarks/engine.py`. Runs in an environment with `flwr[simulation]`.

Prints one JSON object: the seconds of each round, and the peak memory of the driver. Needs nothing of Fedloom, so that
the two may have different dependencies.
"""

import argparse
import itertools
import json
import logging
import resource
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client_app = ClientApp()
server_app = ServerApp()
options = argparse.Namespace()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Decode what came, copy it as training would, encode it again."""
    arrays = [array.copy() for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10})})
    return Message(content=content, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg over all nodes, and note when each round ends."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((options.side, options.rank), dtype=np.float32) for _ in range(options.arrays)]
    ends: list[float] = []

    def note(number: int, current: ArrayRecord) -> MetricRecord:
        ends.append(time.perf_counter())
        return MetricRecord({"round": number})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=options.clients,
        min_available_nodes=options.clients,
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=options.rounds, evaluate_fn=note)
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "driver_gib": peak_kib / 2**20}), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("arrays", "side", "rank", "clients", "rounds", "cpus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=options.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": options.cpus, "address": "local", "include_dashboard": False},
        },
    )
