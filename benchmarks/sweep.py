"""What warm actors save in every trial of a sweep, and what ASHA saves against the full grid.

    python -m benchmarks.sweep fixed        # real seconds of a trial beyond its rounds, cold and warm
    python -m benchmarks.sweep asha         # rounds and best accuracy, every trial to its end and with ASHA

The fixed cost of a trial is what lies between the end of the trial before it on the same slot and the beginning of its
first round, and between the end of its last round and its own: processes, imports, actors, the model, the data, and
records. One trial runs at a time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from ray import tune
from rich.console import Console
from rich.table import Table

from fedloom.jobs.presets import experiment_path
from fedloom.platform.experiment_file import read_document
from fedloom.platform.tracking import Tracking
from fedloom.tuning.sweep import TrialResult, best_first, run_sweep
from fedloom.tuning.sweep_file import Sweep
from fedloom.tuning.sweep_folder import write_sweep
from fedloom.tuning.sweep_plan import plan_sweep

RATES = [0.0003, 0.0007, 0.0015, 0.003, 0.006, 0.0125, 0.025, 0.05, 0.1]


class Ends(tune.Callback):
    """When trials ended, in seconds of one clock; pickled with Ray Tune's state, so the times lie in the class."""

    at: ClassVar[list[float]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note the time."""
        Ends.at.append(time.perf_counter())


def swept(folder: Path, **sections: Any) -> list[TrialResult]:
    """Run a sweep over the demo in a folder of its own and return its trials."""
    os.chdir(folder)
    sweep = Sweep.model_validate({"experiment": "demo", **sections})
    plan = plan_sweep(sweep, read_document(experiment_path("demo")))
    tracking = Tracking(None)
    write_sweep(plan, tracking.uri)
    Ends.at = [time.perf_counter()]
    return run_sweep(plan, tracking, callbacks=[Ends()])[1]


def fixed(folder: Path, *, trials: int, rounds: int) -> None:
    """Print the fixed cost of a trial with cold and with warm actors."""
    table = Table("actors", "seconds of a trial, median", "of these in rounds", "fixed cost")
    costs = {}
    for warm in (False, True):
        results = swept(
            folder,
            name="warm" if warm else "cold",
            set={"rounds": rounds, "evaluation.clients": 0},
            space={"method.server_lr": [1 + index / 100 for index in range(trials)], "method.name": ["fslora"]},
            trials={"concurrent": 1, "warm": warm},
        )
        whole = [end - begin for begin, end in zip(Ends.at, Ends.at[1:], strict=False)][1:]  # the first is cold anyway
        inside = statistics.median(result.metrics["seconds"] * result.rounds for result in results)
        costs[warm] = statistics.median(whole) - inside
        table.add_row(
            "warm" if warm else "cold", f"{statistics.median(whole):.2f}", f"{inside:.2f}", f"{costs[warm]:.2f}"
        )
    Console().print(table)
    Console().print(f"warm / cold: {costs[True] / costs[False]:.3f}")


def asha(folder: Path, *, rounds: int) -> None:
    """Print the rounds that were played and the best accuracy, without and with ASHA."""
    table = Table("scheduler", "trials", "rounds played", "best accuracy", "at learning rate")
    for kind in ("none", "asha"):
        results = swept(
            folder,
            name=kind,
            set={"rounds": rounds, "evaluation.every": 1, "evaluation.clients": 0, "method.name": "florist"},
            space={"training.learning_rate": RATES, "seed": [0, 1]},
            scheduler={"kind": kind, "grace": 3},
        )
        best = best_first(Sweep.model_validate({"name": kind, "space": {"seed": [0]}}), results)[0]
        table.add_row(
            kind,
            str(len(results)),
            str(sum(result.round for result in results)),
            f"{best.metrics['eval/accuracy']:.1%}",
            f"{best.point['training.learning_rate']:g}",
        )
    Console().print(table)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["fixed", "asha"])
    parser.add_argument("--trials", type=int, default=6, help="of `fixed`")
    parser.add_argument("--rounds", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "fixed":
            fixed(Path(folder), trials=options.trials, rounds=options.rounds or 1)
        else:
            asha(Path(folder), rounds=options.rounds or 18)
        os.chdir("/")


if __name__ == "__main__":
    main()
