"""A client actor that takes more memory than is left: Ray's memory monitor kills it, and the run goes on.

    python tests/starved.py                           # or: make chaos; takes up to 6 GiB of memory for a moment

The monitor looks at the whole machine. Its threshold is set to what is in use when the run starts and ``MARGIN_GIB``
more; one client, while it trains, takes memory until it is killed. By default it may
kill others with it, e.g. the server. The run must end with the bits of one in one process; a run that allows no fault
of the kind out_of_memory must end with the rule that it broke, under the policy that kills one process.

It says so, and has shown nothing, where others took or gave back so much memory meanwhile that another process was
killed, or none.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from chaos import once, sums_of
from ray import cloudpickle
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run_through_loss
from fedloom.platform.errors import RoundError
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.worker import ClientWorker

GIB = 2**30
MARGIN_GIB = 4.0  # what the processes of a run take, and more for others
MOST_BYTES = 6 * GIB
STEP_BYTES = 2**28
STEP_S = 0.1  # the monitor looks more often


def hungry_worker(folder):
    """Return the class of client actors of which one, once, takes memory until it is killed or has taken enough."""

    class Hungry(ClientWorker):
        def train_client(self, chunk, client, dispatch):
            trained = super().train_client(chunk, client, dispatch)
            if once(folder, "hungry"):
                taken = []
                while len(taken) * STEP_BYTES < MOST_BYTES:
                    taken.append(b"x" * STEP_BYTES)
                    time.sleep(STEP_S)
                (folder / "sated").touch()
            return trained

    return Hungry


def starved(folder, llama, allowed, *, policy):
    """Run on an embedded cluster under the threshold; return the digest of what came out."""
    folder.mkdir()
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + MARGIN_GIB * GIB) / memory.total
    os.environ |= {
        "RAY_memory_monitor_refresh_ms": "20",
        "RAY_memory_usage_threshold": f"{share:.4f}",
        "RAY_worker_killing_policy_by_group": policy,
    }
    experiment = experiment_of(llama, {"out_of_memory": allowed, "infrastructure": 2})
    prepared = assemble(experiment, make_data())
    executor = RayExecutor(prepared.spec, prepared.data, pools_of(experiment), actors=1, worker=hungry_worker(folder))
    try:
        with Checkpoints(folder / "checkpoints") as checkpoints:
            rounds = list(run_through_loss(experiment, prepared, executor, checkpoints))
        return sums_of(rounds, executor.export())
    finally:
        executor.close()


def experiment_of(llama, faults):
    """Return a small experiment that allows so many faults."""
    return make_experiment(llama, rounds=2, method={"name": "florist"}, faults=faults)


def main():
    """Print what happened; exit with 1 if it is not what must."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for module in (__name__, once.__module__):
        cloudpickle.register_pickle_by_value(sys.modules[module])  # the actors cannot import a program
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        llama = save_llama(folder / "llama")
        began_s = time.monotonic()
        try:
            digest = starved(folder / "survives", llama, 2, policy="0")
        except RoundError as error:  # others took the memory, before or after
            sys.exit(f"nothing is shown, run it on a quieter machine: {error}")
        took_s = time.monotonic() - began_s
        same = digest == sums_of(*finished(experiment_of(llama, {})))
        try:
            starved(folder / "ends", llama, 0, policy="1")
            rule = "it has not"
        except RoundError as error:
            rule = " ".join(str(error).split())
        if any((folder / name / "sated").exists() for name in ("survives", "ends")):
            sys.exit("nothing is shown, run it on a quieter machine: nobody was killed")
    print("| what happened | adapter and metrics equal | seconds of the run |")
    print("|---|---|---|")
    print(f"| client actor killed for its memory | {same} | {took_s:.0f} |")
    print(f"with faults.out_of_memory: 0 how the run ends: {rule[:160]}")
    well = same and "of kind 'out_of_memory'" in rule
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
