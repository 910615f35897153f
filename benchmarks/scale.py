"""How the cost of a round grows with the population and with the cohort: time, memory of driver and server, start.

    python -m benchmarks.scale [--populations 100 1000 10000 100000] [--cohorts 10 100 1000] [--kinds null tiny]

Every row is a run of the driver in a process of its own, with checkpoints, on all cores of this machine: the rounds,
the server actor, the wire, FedIT and the records are those of any run. Null clients train nothing and send back what
they received, the factors of `builtin:tiny` at rank 8; tiny clients train `builtin:tiny` for one step of 8 examples.
Clients hold 40 examples each of `builtin:stdlib`; they overlap, since only their number counts here.

    prepare_s     population, profiles and world, the data being read
    start_s       Ray, actors, and the first evaluation
    round_s       median over the rounds between the first and the last
    driver_mib    peak resident set of the driver, which also read the data
    server_mib    what the server holds of its own after the last round
    round_kb      what a round leaves on disk beside the state: every client's record
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.engine import NullWorker, peak_gib
from benchmarks.world import spread
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run
from fedloom.platform.evaluation import Score
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble, prepare
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.wire import Packet
from fedloom.platform.worker import ClientWorker

POPULATIONS = (100, 1_000, 10_000, 100_000)
COHORTS = (10, 100, 1_000)
KINDS = ("null", "tiny")
ROUNDS = 6
COLUMNS = ("prepare_s", "start_s", "round_s", "driver_mib", "server_mib", "round_kb")


class Unscored(NullWorker):
    """A client actor without a model, whose scores are empty."""

    def score(self, adapter: Packet, indices: np.ndarray, batch_size: int) -> Score:
        """Return the score of no examples."""
        return Score(loss=0.0, correct=0, count=1)


def experiment_of(cohort: int) -> Experiment:
    """Return an experiment of equal clients, hardly evaluated."""
    return Experiment.model_validate(
        {
            "rounds": ROUNDS,
            "data": {"task": "causal_lm", "max_length": 32},
            "population": {"profiles": [{"name": "equal", "share": 1, "rank": 8}]},
            "cohort": {"size": cohort},
            "training": {"steps": 1, "batch_size": 8},
            "evaluation": {"every": ROUNDS, "max_examples": 16, "clients": 0},
            "method": {"name": "fedit"},
        }
    )


def measure(population: int, cohort: int, kind: str) -> dict[str, float]:
    """Measure one row in this process."""
    data = spread(prepare(experiment_of(8)).data, population)
    begin = time.perf_counter()
    prepared = assemble(experiment_of(cohort), data)
    prepared_s = time.perf_counter() - begin
    begin = time.perf_counter()
    worker = Unscored if kind == "null" else ClientWorker
    pools = pools_of(prepared.experiment)
    executor = RayExecutor(prepared.spec, data, pools, actors=os.cpu_count(), worker=worker)
    with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name)) as checkpoints:
        try:
            ends = [time.perf_counter() for _ in run(prepared.experiment, prepared, executor, checkpoints)]
            server_mib = 1024 * peak_gib(executor._server, "RssAnon")
        finally:
            executor.close()
        round_kb = (Path(name) / "rounds" / f"{ROUNDS:06d}.json").stat().st_size / 1000
    rounds = np.diff(ends)[1:-1]  # actors are warm, and the last round evaluates
    return {
        "prepare_s": prepared_s,
        "start_s": ends[0] - begin,
        "round_s": statistics.median(rounds),
        "driver_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "server_mib": server_mib,
        "round_kb": round_kb,
    }


def row_of(population: int, cohort: int, kind: str) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", str(population), str(cohort), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{population} clients, cohort {cohort}, {kind}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description="Time and memory by population and cohort.")
    parser.add_argument("--populations", type=int, nargs="+", default=list(POPULATIONS))
    parser.add_argument("--cohorts", type=int, nargs="+", default=list(COHORTS))
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        logging.disable(logging.INFO)
        print(json.dumps(measure(int(options.one[0]), int(options.one[1]), options.one[2])))
        return
    print(f"{os.cpu_count()} CPUs, ray {ray.__version__}; {ROUNDS} rounds of FedIT")
    print("| clients | population | cohort | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (3 + len(COLUMNS)))
    for kind in options.kinds:
        for cohort in options.cohorts:
            for population in (size for size in options.populations if size >= cohort):
                row = row_of(population, cohort, kind)
                cells = " | ".join(f"{row[name]:.3g}" for name in COLUMNS)
                print(f"| {kind} | {population} | {cohort} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
