"""Bytes of a round that reach the server: as single updates, as partials of chunks, and as one partial for each node.

    python -m benchmarks.crossing

Clients of `benchmarks.engine` (44 float32 arrays, nothing is trained) take part in one round in this process; the
sizes are those of the packets that actors return. One partial for each of four nodes is what no merging could go below;
its CPU time is that of reading, folding and packing, without Ray's calls and copies.
"""

import argparse
import time

import torch

from benchmarks.engine import NullWorker, clients_for, experiment_of, shapes_for
from fedloom.platform.partial import Fold
from fedloom.platform.population import chunks_of, tasks_of
from fedloom.platform.server import Server
from fedloom.platform.wire import pack, pack_partial, unpack_partial

RANK = 8
NODES = 4
MB = 1e6


def measured(method: str, num_clients: int, payload_mb: float) -> dict[str, float]:
    """Play a round; returns numbers of chunks and megabytes."""
    plain = experiment_of(num_clients)
    experiment = plain.model_copy(update={"method": plain.method.model_copy(update={"name": method})})
    shapes = shapes_for(payload_mb)
    server, worker = Server(), NullWorker(None, None, threads=1, fetch=lambda packet: packet)
    server.begin(experiment, shapes, RANK, pack({}), "run")
    chunks = chunks_of(experiment, tasks_of(experiment, clients_for(num_clients), shapes))
    partials, updates = [], 0
    for chunk in chunks:
        partial, records = worker.train(server.dispatch(chunk))
        partials.append(partial)
        updates += sum(record.bytes_up for record in records)
    nodes = []
    begin = time.process_time()
    for node in range(NODES):
        fold = Fold()
        for partial in partials[node::NODES]:
            fold.add(unpack_partial(partial))
        nodes.append(pack_partial(fold.result()).buffer.nbytes)
    return {
        "chunks": len(chunks),
        "updates": updates / MB,
        "partials": sum(partial.buffer.nbytes for partial in partials) / MB,
        "nodes": sum(nodes) / MB,
        "ms": 1000 * (time.process_time() - begin),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Bytes of a round that reach the server.")
    parser.add_argument("--payload-mb", type=float, default=5.0)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| method | clients | chunks | updates, MB | partials of chunks, MB | of {NODES} nodes, MB | merging, ms |")
    print("|---|---|---|---|---|---|---|")
    for method in ("fedit", "fslora", "flexlora"):
        for num_clients in options.cohorts:
            row = measured(method, num_clients, options.payload_mb)
            figures = f"{row['updates']:.0f} | {row['partials']:.0f} | {row['nodes']:.0f} | {row['ms']:.0f}"
            print(f"| {method} | {num_clients} | {row['chunks']} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
