"""What the unequal world costs: its bookkeeping in a round, and the start with a large population.

    python -m benchmarks.world

Bookkeeping is `World.open` and `World.close`: availability, sampling, fading, counting tokens, TSFA's decision, shares
of the band, totals. It stands beside the time that one core trains such a cohort of `builtin:tiny`, measured on eight
clients. The start is `assemble` and the first round's opening, in a process of its own for each size of population.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, pools_of
from fedloom.platform.preparation import assemble, prepare, world_of
from fedloom.platform.record import Record

POPULATIONS = (100, 10_000)
COHORT = 100
ROUNDS = 7
EXAMPLES = 40  # of each client


def experiment_of(cohort: int) -> Experiment:
    """Return a wireless world steered by TSFA, with absences."""
    profile = {"name": "phone", "share": 1, "rank": 16, "compute_gflop_per_s": 5, "availability": 0.9}
    return Experiment.model_validate(
        {
            "population": {"profiles": [profile]},
            "cohort": {"size": cohort},
            "network": {"kind": "wireless"},
            "controller": {"name": "tsfa", "latency_limit_s": 10.0},
            "training": {"steps": 5, "batch_size": 8},
            "method": {"name": "soft"},
        }
    )


def spread(data: FederatedData, num_clients: int) -> FederatedData:
    """Give every client the same number of examples; they overlap, since only their lengths count here."""
    total = len(data.offsets) - 1
    clients = {f"c{i}": np.arange(i * EXAMPLES, (i + 1) * EXAMPLES) % total for i in range(num_clients)}
    return FederatedData(**{**{name: getattr(data, name) for name in data.__dataclass_fields__}, "clients": clients})


def start(num_clients: int) -> dict[str, float]:
    """Measure the start in this process: seconds, and the peak resident set before and after."""
    experiment = experiment_of(min(COHORT, num_clients * 4 // 5))
    data = prepare(experiment.model_copy(update={"cohort": experiment.cohort.model_copy(update={"size": 8})})).data
    begin = time.perf_counter()
    prepared = assemble(experiment, spread(data, num_clients))
    world_of(experiment, prepared).open(1)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def bookkeeping() -> dict[str, float]:
    """Measure rounds of the world with records in the place of training, and one trained client."""
    experiment = experiment_of(COHORT)
    small = experiment.model_copy(update={"cohort": experiment.cohort.model_copy(update={"size": 8})})
    prepared = assemble(experiment, spread(prepare(small).data, 2 * COHORT))
    world = world_of(experiment, prepared)
    seconds = []
    for number in range(1, ROUNDS + 1):
        begin = time.perf_counter()
        opened = world.open(number)
        between = time.perf_counter()
        records = [
            Record(
                client=task.client.id, profile="phone", rank=16, num_examples=1, bytes_down=1, loss=1.0, importance=1.0
            )
            for task in opened.tasks
        ]
        middle = time.perf_counter()
        world.close(records)
        seconds.append(time.perf_counter() - middle + between - begin)
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    executor.begin(experiment, prepared.shapes, 16)
    chunks = chunks_of(experiment, opened.tasks[:8])
    executor.train(chunks)
    begin = time.perf_counter()
    executor.train(chunks)
    trained = (time.perf_counter() - begin) / 8 * COHORT
    executor.close()
    return {"world_ms": 1000 * statistics.median(seconds[1:]), "training_ms": 1000 * trained}


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description="What the unequal world costs.")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    cost = bookkeeping()
    print(
        f"{COHORT} clients: {cost['world_ms']:.1f} ms a round, beside {cost['training_ms']:.0f} ms of training on one "
        f"core: {cost['world_ms'] / cost['training_ms']:.2%}"
    )
    results: dict[int, dict[str, Any]] = {}
    for size in POPULATIONS:
        command = [sys.executable, "-m", "benchmarks.world", "--start", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[size] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size} clients: start {results[size]['seconds']:.2f} s, peak {results[size]['peak_mib']:.0f} MiB")
    few, many = (results[size] for size in POPULATIONS)
    print(f"beyond: {many['seconds'] - few['seconds']:.2f} s, {many['peak_mib'] - few['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
