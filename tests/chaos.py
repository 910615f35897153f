"""A run on a Ray cluster that loses actors, processes, nodes, its server and its driver, on a schedule from a seed.

    python tests/chaos.py --rounds 20 --seed 0        # or: make chaos

The cluster has a head without CPUs and two nodes with one CPU each, all on this machine. At the end the adapter and
the metrics must be those of a run in one process that nobody has disturbed, bit for bit.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from small import finished, make_data, make_experiment, save_llama

# What happens, and where: in the middle of a client's training, after a round in the driver, or from outside.
IN_TRAINING = ("process killed", "reply delayed")
AFTER_ROUND = ("actor killed", "server killed")
FROM_OUTSIDE = ("node lost", "driver killed")
KINDS = IN_TRAINING + AFTER_ROUND + FROM_OUTSIDE
DELAY_S = 2.0
ROUND = "chaos: round "


def schedule_of(seed, rounds):
    """Return what happens in which round: every kind in turn, in an order from the seed; nothing in the last."""
    draw = random.Random(seed)
    kinds = []
    while len(kinds) < rounds - 1:
        kinds += draw.sample(KINDS, len(KINDS))
    return {str(number + 1): kind for number, kind in enumerate(kinds[: rounds - 1])}


def experiment_of(folder, rounds):
    """Return a small experiment whose budgets for faults are not what ends it."""
    population = {
        "profiles": [{"name": f"rank-{rank}", "share": 1, "rank": rank, "compute_gflop_per_s": 1} for rank in (2, 4)]
    }
    return make_experiment(
        folder / "llama",
        rounds=rounds,
        population=population,
        network={"kind": "wireless"},
        method={"name": "florist"},
        faults={"infrastructure": 1000},
    )


def sums_of(rounds, adapter):
    """Return a digest of everything that must not depend on faults."""
    free = {"seconds", "retries", "refused/duplicate", "refused/stale"}
    metrics = [{name: repr(value) for name, value in done.metrics.items() if name not in free} for done in rounds]
    records = [[(r.client, r.bytes_up, repr(r.loss), repr(r.upload_s)) for r in done.records] for done in rounds]
    weights = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in adapter.tensors().items()}
    return hashlib.sha256(json.dumps([metrics, records, weights], sort_keys=True).encode()).hexdigest()


def once(folder, name):
    """Whether this is the first time that anybody asks for ``name``, in any process."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
        return True
    return False


def fragile_worker(folder, schedule):
    """Return the class of client actors to which things happen in the middle of training."""
    from fedloom.platform.worker import ClientWorker

    class Fragile(ClientWorker):
        def train_client(self, chunk, client, dispatch):
            trained = super().train_client(chunk, client, dispatch)
            kind = schedule.get(str(chunk.number + 1))
            if kind in IN_TRAINING and once(folder, f"done-{chunk.number + 1}"):
                if kind == "process killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait(DELAY_S)
            return trained

    return Fragile


def drive(folder, address, rounds):
    """Be the driver: run or go on, let things happen after rounds, and write the digest at the end."""
    import ray
    from ray import cloudpickle

    from fedloom.platform.checkpoint import Checkpoints
    from fedloom.platform.driver import run_through_loss
    from fedloom.platform.population import pools_of
    from fedloom.platform.preparation import assemble
    from fedloom.platform.ray_executor import RayExecutor

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    schedule = json.loads((folder / "schedule.json").read_text())
    experiment = experiment_of(folder, rounds)
    prepared = assemble(experiment, make_data())
    worker = fragile_worker(folder, schedule)
    executor = RayExecutor(prepared.spec, prepared.data, pools_of(experiment), address=address, worker=worker)
    played = []
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for done in run_through_loss(experiment, prepared, executor, checkpoints):
            played.append(done)
            kind = schedule.get(str(done.number))
            if kind in AFTER_ROUND and once(folder, f"done-{done.number}"):
                victim = executor._server if kind == "server killed" else executor.crew.slots[0].actor
                ray.kill(victim, no_restart=True)
            print(f"{ROUND}{done.number} {int(done.metrics.get('retries', 0))}", flush=True)
            sys.stdin.readline()  # what comes from outside happens now, before the next round
    (folder / "digest").write_text(sums_of(played, executor.export()))
    executor.close()


def started_driver(folder, address, rounds):
    """Start the driver in a process of its own."""
    command = [sys.executable, __file__, "--drive", str(folder), "--address", address, "--rounds", str(rounds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def chaos(folder, *, rounds, seed):
    """Run on a cluster while things happen. Returns the counts by kind, retries, seconds by round and the digest."""
    from ray.cluster_utils import Cluster

    schedule = schedule_of(seed, rounds)
    (folder / "schedule.json").write_text(json.dumps(schedule))
    save_llama(folder / "llama")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    draw = random.Random(seed + 1)
    retries, ends = {}, {}
    begin = time.monotonic()
    try:
        while not (folder / "digest").exists():
            driver = started_driver(folder, cluster.address, rounds)
            for line in driver.stdout:
                if not line.startswith(ROUND):
                    continue  # Ray's own words about what was killed
                number, again = map(int, line.removeprefix(ROUND).split())
                retries[number] = again
                ends.setdefault(number, time.monotonic() - begin)
                kind = schedule.get(str(number))
                if kind in FROM_OUTSIDE and once(folder, f"done-{number}"):
                    if kind == "driver killed":
                        driver.kill()
                        break
                    cluster.remove_node(nodes.pop(draw.randrange(2)), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1))
                print(file=driver.stdin, flush=True)
            if driver.wait() not in {0, -signal.SIGKILL}:
                raise SystemExit(f"the driver ended with exit code {driver.returncode}")
    finally:
        cluster.shutdown()
    seconds = {number: ends[number] - ends[number - 1] for number in ends if number - 1 in ends}
    return schedule, retries, seconds, (folder / "digest").read_text()


def undisturbed(folder, rounds):
    """Return the digest of the same experiment in this process."""
    return sums_of(*finished(experiment_of(folder, rounds)))


def main():
    """Print what was injected, what it cost, and whether the result is the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.address, options.rounds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        schedule, retries, seconds, digest = chaos(folder, rounds=options.rounds, seed=options.seed)
        same = digest == undisturbed(folder, options.rounds)
    quiet = [seconds[number] for number in seconds if str(number) not in schedule and str(number - 1) not in schedule]
    print("| what happened | times | survived | seconds until the round after it was done, median |")
    print("|---|---|---|---|")
    for kind, times in sorted(Counter(schedule.values()).items()):
        hit = [int(number) + (kind not in IN_TRAINING) for number, what in schedule.items() if what == kind]
        costs = [seconds[number] for number in hit if number in seconds]
        print(f"| {kind} | {times} | {times} | {statistics.median(costs):.1f} |")
    print(f"clients trained again: {int(sum(retries.values()))}; adapter and metrics equal: {same}")
    if quiet:
        print(f"a round that nothing disturbs: {statistics.median(quiet):.1f} s")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
