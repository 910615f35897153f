"""Who learns what in how much simulated time: SOFT and FSLoRA under TSFA, SOFT at fixed ratios, and FedIT.

    python -m benchmarks.wireless                      # prints the table of docs/results.md
    python -m benchmarks.wireless --rounds 8 --seeds 0

All run in the wireless world of the preset ``wireless``, and for each seed over the same clients, places, fading and
cohorts; the data and their partition are those of seed 0. The limit on the mean round is the preset's; only TSFA knows
of it. First, what can be had at all is printed: the mean over 100 rounds of the earliest times at which everybody can
have sent one rank, and all ranks.
Accuracy is that of the global model on all held-out examples, after the last round, and at the last evaluation within
the simulated time that rounds of the limit's length would have taken. With several seeds, means and sample standard
deviations.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom.jobs.presets import experiment_path
from fedloom.jobs.runs import open_executor
from fedloom.methods.tsfa_band import finish_times
from fedloom.platform.driver import run
from fedloom.platform.executor import Executor
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import load_experiment, validated
from fedloom.platform.preparation import Prepared, assemble, prepare, world_of
from fedloom.platform.rounds import Round

DRAWS = 100
FIXED_RATIOS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of one seed."""

    accuracy: float
    accuracy_in_time: float
    mean_round_s: float
    megabytes_up: float
    mean_ratio: float
    queue_s: float


def variants(base: Experiment, limit_s: float) -> dict[str, dict[str, Any]]:
    """Return what differs from the preset, by the name of the row."""
    tsfa = {"name": "tsfa", **base.controller.options, "latency_limit_s": limit_s}
    rows = {
        "SOFT, TSFA": {"method": {"name": "soft"}, "controller": tsfa},
        "FSLoRA, TSFA": {"method": {"name": "fslora"}, "controller": tsfa},
    }
    for ratio in FIXED_RATIOS:
        rows[f"SOFT, ratio {ratio:g}"] = {"method": {"name": "soft", "keep_ratio": ratio}, "controller": {}}
    return rows | {"FedIT": {"method": {"name": "fedit"}, "controller": {}}}


def changed(base: Experiment, **sections: Any) -> Experiment:
    """Return the experiment with whole sections replaced."""
    return validated(base.model_dump(mode="json") | sections, place="benchmarks/wireless.py")


def earliest_s(experiment: Experiment, prepared: Prepared) -> tuple[float, float]:
    """Return the mean over rounds of the earliest time for one rank of each client, and for all ranks."""
    world = world_of(experiment, prepared)
    times = []
    for number in range(1, DRAWS + 1):
        known = world.conditions(number)
        if known is None or known.channel.snr_hz is None or known.channel.bandwidth_hz is None:
            raise SystemExit("the preset has no shared band")
        bits = known.fixed_bits + np.array([[1 / known.rank], [1.0]]) * known.factor_bits
        times.append(
            finish_times(
                bits, known.before_upload_s, snr_hz=known.channel.snr_hz, bandwidth_hz=known.channel.bandwidth_hz
            )
        )
    one, every = np.mean(times, axis=0)
    return float(one), float(every)


def played(experiment: Experiment, executor: Executor, data: Any) -> list[Round]:
    """Run an experiment on data that are at hand."""
    return list(run(experiment, assemble(experiment, data), executor))


def entry_of(rounds: Sequence[Round], limit_s: float) -> Entry:
    """Sum a run up."""
    after = [done for done in rounds if done.number > 0]
    budget_s = limit_s * len(after)
    in_time = [done for done in rounds if done.metrics.get("sim/seconds", 0.0) <= budget_s]
    evaluated = [done.metrics["eval/accuracy"] for done in in_time if "eval/accuracy" in done.metrics]
    ratios = [record.ratio for done in after for record in done.records]
    return Entry(
        accuracy=after[-1].metrics["eval/accuracy"],
        accuracy_in_time=evaluated[-1],
        mean_round_s=statistics.mean(done.metrics["sim/round_s"] for done in after),
        megabytes_up=sum(done.metrics["bytes/up"] for done in after) / 1e6,
        mean_ratio=statistics.mean(ratios),
        queue_s=after[-1].metrics.get("controller/queue_s", float("nan")),
    )


def in_words(values: Sequence[float], form: str) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def main() -> None:
    """Print the limit and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    base = load_experiment(experiment_path("wireless"), [f"rounds={options.rounds}", "evaluation.every=2"])
    prepared = prepare(base)
    entries: dict[str, list[Entry]] = {}
    limit_s = float(base.controller.options["latency_limit_s"])
    one_s, all_s = earliest_s(base, prepared)
    print(f"limit on the mean round: {limit_s:g} s; {options.rounds} rounds; seeds {options.seeds}", flush=True)
    print(f"earliest mean round with one rank of each client: {one_s:.2f} s, with all: {all_s:.2f} s", flush=True)
    with open_executor(base, prepared) as executor:
        for seed in options.seeds:
            for name, sections in variants(base, limit_s).items():
                done = played(changed(base, seed=seed, **sections), executor, prepared.data)
                entries.setdefault(name, []).append(entry_of(done, limit_s))
    print("| | accuracy | accuracy in time | mean round, s | MB up | mean ratio |\n|---|---|---|---|---|---|")
    for name, of_seeds in entries.items():
        cells = [
            in_words([100 * entry.accuracy for entry in of_seeds], ".1f"),
            in_words([100 * entry.accuracy_in_time for entry in of_seeds], ".1f"),
            in_words([entry.mean_round_s for entry in of_seeds], ".2f"),
            in_words([entry.megabytes_up for entry in of_seeds], ".1f"),
            in_words([entry.mean_ratio for entry in of_seeds], ".2f"),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
