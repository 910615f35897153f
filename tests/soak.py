"""A long run of clients that train nothing, to see whether anything grows.

    python tests/soak.py                              # 300 rounds; prints memory, files, threads and objects

Memory is what each process has for itself (USS), so that Ray's shared memory is not counted many times. It exits with 1
if driver, server or client actors have grown by more than the tolerance since the rounds in which they settled.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil
import ray
from ray import cloudpickle
from small import make_data, make_experiment, save_llama

from benchmarks import engine
from benchmarks.engine import NullWorker
from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run_through_loss
from fedloom.platform.evaluation import Score
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.wire import pack

MIB = 2**20


class SoakWorker(NullWorker):
    """A client actor without a model, whose evaluations cost nothing either."""

    def initial_head(self, seed):
        """Return an empty head."""
        return pack({})

    def score(self, adapter, indices, batch_size):
        """Return a score of the right count."""
        return Score(loss=1.0, correct=0, count=len(indices))


def measured():
    """Return memory in MiB, files and threads by kind of process, and the driver's references to Ray objects."""
    found = defaultdict(float)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        title = " ".join(process.cmdline()[:1])
        kind = "driver" if process.pid == psutil.Process().pid else title.removeprefix("ray::").split(".")[0]
        if kind in {"driver", "Server", "SoakWorker"}:
            found[f"{kind}, MiB"] += process.memory_full_info().uss / MIB
            found[f"{kind}, files"] += process.num_fds()
            found[f"{kind}, threads"] += process.num_threads()
    found["references to Ray objects"] = len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())
    return dict(found)


def soak(folder, *, rounds, settled):
    """Return the measurements after the rounds in which things settle, and after the last."""
    for module in (__import__(SoakWorker.__module__), engine):
        cloudpickle.register_pickle_by_value(module)
    experiment = make_experiment(
        save_llama(folder / "llama"), rounds=rounds, cohort={"size": 6}, evaluation={"every": 10, "clients": 0}
    )
    prepared = assemble(experiment, make_data())
    executor = RayExecutor(prepared.spec, prepared.data, pools_of(experiment), actors=2, worker=SoakWorker)
    at = {}
    try:
        with Checkpoints(folder / "checkpoints") as checkpoints:
            for done in run_through_loss(experiment, prepared, executor, checkpoints):
                if done.number in {settled, rounds}:
                    at[done.number] = measured()
    finally:
        executor.close()
    return at[settled], at[rounds]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--settled", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=0.05)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        before, after = soak(Path(temporary), rounds=options.rounds, settled=options.settled)
    print(f"| | after round {options.settled} | after round {options.rounds} | growth |\n|---|---|---|---|")
    too_much = []
    for name, old in before.items():
        growth = (after[name] - old) / old
        print(f"| {name} | {old:.4g} | {after[name]:.4g} | {growth:+.1%} |")
        if growth > options.tolerance:
            too_much.append(name)
    raise SystemExit(f"grows by more than {options.tolerance:.0%}: {', '.join(too_much)}" if too_much else 0)


if __name__ == "__main__":
    main()
