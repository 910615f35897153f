"""Runs that are killed outright at random moments, and go on.

    python tests/cuts.py --cuts 60                    # prints how many ended with the same bits

Every run is a process of its own, killed with SIGKILL at a moment drawn over the length of an undisturbed run, and then
continued by another process. Processes are forked from one that has everything imported and has trained nothing.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from chaos import sums_of
from small import make_data, make_experiment, save_llama

from fedloom.platform.checkpoint import Checkpoints
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble

STEERED = {
    "population": {"profiles": [{"name": "phone", "share": 1, "rank": 4, "compute_gflop_per_s": 1}]},
    "network": {"kind": "wireless", "bandwidth_mhz": 0.02},
    "controller": {"name": "tsfa", "latency_limit_s": 0.01},
}
CASES = {
    "florist": {"method": {"name": "florist"}},
    "flexlora": {"method": {"name": "flexlora"}},
    "fslora, server AdamW": {"method": {"name": "fslora", "server_step": "adamw"}},
    "soft, TSFA": {"method": {"name": "soft"}, **STEERED},
}
ROUNDS = 8


def play(folder, case, ready):
    """Run or go on to the end; call ``ready`` before the first round, write the digest at the end."""
    experiment = make_experiment(folder.parent / "llama", rounds=ROUNDS, **CASES[case])
    prepared = assemble(experiment, make_data())
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    ready()
    with Checkpoints(folder) as checkpoints:
        rounds = list(run(experiment, prepared, executor, checkpoints))
        found = {
            "digest": sums_of(rounds, executor.export()),
            "restored": checkpoints.num_restored,
            "notes": checkpoints.notes,
        }
    (folder / "found.json").write_text(json.dumps(found))


def forked(folder, case, *, killed_after_s=None):
    """Play in a child process, which may be killed; returns whether it ended by itself, and its seconds of rounds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            play(folder, case, lambda: os.write(writing, b"x"))
        finally:
            os._exit(0 if (folder / "found.json").exists() else 1)
    os.close(writing)
    os.read(reading, 1)  # nothing comes if the child fails before
    os.close(reading)
    begin = time.monotonic()
    if killed_after_s is not None:
        timer = threading.Timer(killed_after_s, lambda: os.kill(child, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(child, 0)
    if killed_after_s is not None:
        timer.cancel()
    return os.waitstatus_to_exitcode(status) == 0, time.monotonic() - begin


def cut_and_resume(parent, cuts, seed):
    """Return, for every cut: the case, the moment, rounds restored, and whether the end was the same."""
    draw = random.Random(seed)
    save_llama(parent / "llama")
    whole, length_s = {}, {}
    for case in CASES:
        folder = parent / f"whole-{case}"
        _, length_s[case] = forked(folder, case)
        whole[case] = json.loads((folder / "found.json").read_text())["digest"]
    results = []
    for number in range(cuts):
        case = list(CASES)[number % len(CASES)]
        folder = parent / f"cut-{number}"
        moment = draw.uniform(0, length_s[case])
        ended, _ = forked(folder, case, killed_after_s=moment)
        if not ended:
            forked(folder, case)
        found = json.loads((folder / "found.json").read_text())
        results.append((case, ended, found["restored"], found["digest"] == whole[case]))
    return results


def main():
    """Print how many cuts there were, where, and how many ended with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = cut_and_resume(Path(temporary), options.cuts, options.seed)
    print("| run | killed | ended before | equal |\n|---|---|---|---|")
    for case in CASES:
        own = [result for result in results if result[0] == case]
        ended = sum(result[1] for result in own)
        print(f"| {case} | {len(own) - ended} | {ended} | {sum(result[3] for result in own)} of {len(own)} |")
    restored = Counter(result[2] for result in results if not result[1])
    print("rounds on disk when a run was killed:", ", ".join(f"{n}: {c}" for n, c in sorted(restored.items())))
    raise SystemExit(0 if all(result[3] for result in results) else 1)


if __name__ == "__main__":
    main()
