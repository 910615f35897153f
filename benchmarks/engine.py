"""Overhead per client and round of the engine, with clients that train nothing, beside two other ways to do it.

    python -m benchmarks.engine                                  # Fedloom and a single-process loop
    python -m benchmarks.engine --flower PYTHON                  # and Flower, from an environment of its own

Every way moves the same payload (44 float32 arrays) to every client and back and takes the weighted mean:

    loop      one process: decode, copy, weighted sum; what no engine can beat by much
    fedloom   `RayExecutor` with the worker, server, wire and method (FedIT) of a real run; only training is left out
    flower    `flwr[simulation]`: run_simulation, FedAvg, a client that decodes and re-encodes

The unit is milliseconds of wall time per client and round, the median over rounds after the first; rounds of the ways
are not interleaved within a size, but the ways follow each other size by size. Memory is the peak resident set of
driver and server, which counts the pages of Ray's shared object store that they have read; `server_own_gib` is what
the server holds of its own after the last round.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.client import Client
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Dispatch
from fedloom.platform.population import chunks_of, pools_of, tasks_of
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.received import received_adapter
from fedloom.platform.sent import SentChunk
from fedloom.platform.trainer import Trained
from fedloom.platform.wire import pack, unpack
from fedloom.platform.worker import ClientWorker

NUM_MODULES = 22  # two factors each: 44 arrays
RANK = 8
PAYLOADS_MB = (0.1, 5.0, 50.0)
COHORTS = (10, 100)


def shapes_for(payload_mb: float) -> dict[str, tuple[int, int]]:
    """Return square modules whose factors of rank 8 add up to the payload."""
    side = max(1, round(payload_mb * 1e6 / 4 / (NUM_MODULES * 2 * RANK)))
    return {f"module.{index}": (side, side) for index in range(NUM_MODULES)}


# Of clients that train nothing: nobody builds it.
NO_MODEL = ModelSpec(
    path="",
    revision=None,
    dtype="float32",
    task="causal_lm",
    label_names=(),
    pad_token_id=0,
    targets=None,
    dropout=0.0,
)


class NullWorker(ClientWorker):
    """A client actor whose clients train nothing: all of a real one but the base model."""

    def __init__(self, spec: Any, data: Any, **settings: Any) -> None:
        """Take everything but the model."""
        self._shapes = {}
        self._threads = settings["threads"]
        self._fetch = settings["fetch"]
        torch.set_num_threads(self._threads)

    def initial_head(self, seed: int) -> Any:
        """Return an empty head: there is no classifier."""
        return pack({})

    def train_client(self, chunk: SentChunk, client: Client, dispatch: Dispatch) -> Trained:
        """Return what was received, copied as training would."""
        received = received_adapter(dispatch, {})
        copied = {name: tensor.clone() for name, tensor in received.tensors().items()}
        return Trained(adapter=Adapter.from_tensors(copied, received.scale), loss=0.0, steps=0)


def experiment_of(num_clients: int, chunk_size: int | None = None) -> Experiment:
    """Return an experiment in which every client takes part in every round."""
    return Experiment.model_validate(
        {
            "cohort": {"size": num_clients},
            "population": {"profiles": [{"name": "equal", "share": 1, "rank": RANK}]},
            "method": {"name": "fedit"},
            "chunk_size": chunk_size,
        }
    )


def clients_for(num_clients: int) -> list[Client]:
    """Return clients of equal size."""
    return [Client(id=f"c{i}", profile="equal", rank=RANK, num_examples=10) for i in range(num_clients)]


def loop_seconds(payload_mb: float, num_clients: int, rounds: int) -> list[float]:
    """Time the plain loop: unpack, copy, weighted sum in place, divide."""
    flat = {
        f"{module}.{kind}": torch.randn(side, RANK)
        for module, (side, _) in shapes_for(payload_mb).items()
        for kind in "AB"
    }
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        packet = pack(flat)
        total = {name: torch.zeros_like(tensor) for name, tensor in flat.items()}
        for _ in range(num_clients):
            for name, tensor in unpack(packet).items():
                total[name].add_(tensor.clone(), alpha=10.0)
        flat = {name: tensor / (10.0 * num_clients) for name, tensor in total.items()}
        seconds.append(time.perf_counter() - begin)
    return seconds


def fedloom_seconds(
    executor: RayExecutor, payload_mb: float, num_clients: int, rounds: int, chunk_size: int | None
) -> list[float]:
    """Time rounds of the engine: dispatch, client actors, fold, finish."""
    experiment = experiment_of(num_clients, chunk_size)
    executor.begin(experiment, shapes_for(payload_mb), RANK)
    chunks = chunks_of(experiment, tasks_of(experiment, clients_for(num_clients), shapes_for(payload_mb)))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        executor.train(chunks)
        executor.finish(len(chunks))
        seconds.append(time.perf_counter() - begin)
    return seconds


def flower_result(python: str, payload_mb: float, num_clients: int, rounds: int, cpus: int) -> dict[str, Any]:
    """Run Flower in its own environment on the same payload."""
    side = next(iter(shapes_for(payload_mb).values()))[0]
    sizes = {"arrays": 2 * NUM_MODULES, "side": side, "rank": RANK, "clients": num_clients, "rounds": rounds}
    script = Path(__file__).with_name("flower_engine.py")
    arguments = [f"--{name}={value}" for name, value in (sizes | {"cpus": cpus}).items()]
    done = subprocess.run(
        [python, "-W", "ignore", str(script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"Flower failed with {done.returncode}:\n{done.stderr[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"'))
    result: dict[str, Any] = json.loads(line)
    return result


def peak_gib(actor: Any = None, kind: str = "VmHWM") -> float:
    """Return the peak resident set of this process, or of an actor's; `RssAnon` is what it holds of its own, now."""

    def read(_: Any = None) -> float:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1]) / 2**20

    return read() if actor is None else float(ray.get(actor.__ray_call__.remote(read)))


def measured(
    python: str | None, payload_mb: float, num_clients: int, cpus: int, chunk_size: int | None
) -> dict[str, float]:
    """Measure one size in every way; milliseconds of wall time per client and round."""
    rounds = 3 if payload_mb * num_clients > 1000 else 7
    row = {"payload_mb": payload_mb, "clients": num_clients}
    row["loop"] = per_client_ms(loop_seconds(payload_mb, num_clients, rounds), num_clients)
    executor = RayExecutor(
        NO_MODEL,
        None,  # type: ignore[arg-type]
        pools_of(experiment_of(num_clients)),
        actors=cpus,
        worker=NullWorker,
        share_model=False,
    )
    try:
        row["fedloom"] = per_client_ms(
            fedloom_seconds(executor, payload_mb, num_clients, rounds, chunk_size), num_clients
        )
        row["driver_gib"], row["server_gib"] = peak_gib(), peak_gib(executor._server)
        row["server_own_gib"] = peak_gib(executor._server, "RssAnon")
    finally:
        executor.close()
    if python:
        result = flower_result(python, payload_mb, num_clients, rounds, cpus)
        row["flower"] = per_client_ms(result["seconds"], num_clients)
        row["flower_driver_gib"] = result["driver_gib"]
        row["times"] = row["flower"] / row["fedloom"]
    return row


def per_client_ms(seconds: Sequence[float], num_clients: int) -> float:
    """Return the median over rounds after the first, per client."""
    return 1000 * statistics.median(seconds[1:]) / num_clients


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description="Overhead of the engine per client and round.")
    parser.add_argument("--flower", metavar="PYTHON", help="python of an environment with flwr[simulation]")
    parser.add_argument("--payloads-mb", type=float, nargs="+", default=list(PAYLOADS_MB))
    parser.add_argument("--cohorts", type=int, nargs="+", default=list(COHORTS))
    parser.add_argument("--chunk-size", type=int, help="clients of a chunk; by default a sixteenth of the cohort")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpus = os.cpu_count() or 1
    columns = ["payload_mb", "clients", "loop", "fedloom", "driver_gib", "server_gib", "server_own_gib"]
    columns += ["flower", "flower_driver_gib", "times"] if options.flower else []
    print(f"ms per client and round, {cpus} CPUs, torch {torch.__version__}, ray {ray.__version__}")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for payload_mb in options.payloads_mb:
        for num_clients in options.cohorts:
            row = measured(options.flower, payload_mb, num_clients, cpus, options.chunk_size)
            print("| " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
