"""Jobs on real Ray heads: one whose cluster is killed and that goes on on another, one that is stopped, and a sweep.

python tests/lost_cluster.py        # or: make chaos
"""

import contextlib
import hashlib
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from commands import fedloom, make_world, started
from heads import BIN, TOKEN, started_head

ROUNDS = 40
LOST_AFTER = "round 5/"
TIMEOUT_S = 600


def cluster_folder(folder):
    """Make the folder that the clusters share: model, data, an experiment of many rounds, a sweep of two trials."""
    make_world(folder)
    document = yaml.safe_load((folder / "mine.yaml").read_text())
    document |= {"rounds": ROUNDS, "model": {"name": f"{folder}/model"}}
    document["data"]["source"] = f"{folder}/rows.jsonl"
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    space = {"training.learning_rate": [0.01, 0.02]}
    sweep = {"name": "knobs", "experiment": f"{folder}/mine.yaml", "set": {"rounds": 1}, "space": space}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))


def done(folder, head, *arguments):
    """Run a command against a cluster to its end and return what it prints."""
    ended = fedloom(*arguments, "--address", head.jobs, cwd=folder, **known())
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def known():
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def submitted(folder, head, *arguments):
    """Submit a job and begin to follow it."""
    job = done(folder, head, "submit", *arguments, "--folder", folder)
    return job, started("logs", job, "--follow", "--address", head.jobs, cwd=folder, **known())


def until(process, text):
    """Read what a process prints until a line holds a text."""
    for line in process.stdout:
        if text in line:
            return
    raise SystemExit(f"{text!r} was never printed: {process.communicate()[1]}")


def runs_of(folder):
    return {path.parent.name for path in (folder / "fedloom-runs" / "checkpoints").glob("*/run.json")}


def final_adapter(folder, run):
    (weights,) = (folder / "fedloom-runs").rglob(f"{run}*/artifacts/adapters/final/adapter_model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def lose(head):
    """Kill every process of a cluster at once, as a power failure would."""
    for process in [*psutil.Process(head.process.pid).children(recursive=True), head.process]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def run_until_lost(folder):
    """Submit a job and kill its cluster; returns the id of the run and that of the job."""
    with started_head(dashboard=True) as head:
        job, following = submitted(folder, head, "mine.yaml")
        until(following, LOST_AFTER)
        lose(head)
        following.kill()
        following.communicate()
    (run,) = runs_of(folder)
    return run, job


def check_resume(folder, head, lost):
    """The run of a lost job goes on on a new cluster, from a checkpoint and to its end; returns its first round."""
    job, following = submitted(folder, head, "--resume", lost)
    said, _ = following.communicate(timeout=TIMEOUT_S)
    assert following.returncode == 0, said
    numbers = [int(number) for number in re.findall(r": round (\d+)/", said)]
    assert numbers[0] >= 5, said
    assert numbers[-1] == ROUNDS, said
    assert "succeeded" in done(folder, head, "status", job)
    return numbers[0]


def check_stop(folder, head):
    """A job that is stopped ends its record."""
    before = runs_of(folder)
    job, following = submitted(folder, head, "mine.yaml", "--set", "rounds=100000")
    until(following, "round 1/")
    assert "is asked to end" in done(folder, head, "stop", job)
    said, _ = following.communicate(timeout=TIMEOUT_S)
    (run,) = runs_of(folder) - before
    with contextlib.closing(sqlite3.connect(folder / "fedloom-runs" / "mlflow.db")) as store:
        (status,) = store.execute("SELECT status FROM runs WHERE run_uuid = ?", (run,)).fetchone()
    assert status == "KILLED", said
    assert f"go on with: fedloom submit --resume {run[:8]} --folder" in said, said
    assert "stopped" in done(folder, head, "status", job)


def check_sweep(folder, head):
    _, following = submitted(folder, head, "sweep.yaml")
    said, _ = following.communicate(timeout=TIMEOUT_S)
    assert following.returncode == 0, said
    assert "2 trials of 1 rounds" in said, said


def check_plain_submit(folder, head):
    """``ray job submit -- fedloom run``, with the Fedloom that the cluster has installed."""
    command = [f"{BIN}/ray", "job", "submit", "--address", head.jobs, "--", "fedloom", "run", f"{folder}/mine.yaml"]
    options = ["--address", "auto", "--set", "rounds=1", "--tracking-uri", f"sqlite:///{folder}/plain.db"]
    plain = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | known()
    ended = subprocess.run(command + options, env=plain, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "round 1/1" in ended.stdout


def main():
    """Print what was tried, and how long it took."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "cluster")
        folder.mkdir()
        cluster_folder(folder)
        begin = time.monotonic()
        run, job = run_until_lost(folder)
        print(f"cluster killed after round 5 of {ROUNDS}: {time.monotonic() - begin:.0f} s", flush=True)
        with started_head(dashboard=True) as head:
            first = check_resume(folder, head, job)
            alone = Path(temporary, "alone")
            alone.mkdir()
            ended = fedloom("run", folder / "mine.yaml", "--executor", "local", cwd=alone)
            assert ended.returncode == 0, ended.stderr
            same = final_adapter(folder, run) == final_adapter(alone, next(iter(runs_of(alone))))
            print(
                f"resumed on a new cluster from round {first}; adapter equal to an undisturbed run: {same}", flush=True
            )
            for check in (check_stop, check_sweep, check_plain_submit):
                begin = time.monotonic()
                check(folder, head)
                print(f"{check.__name__}: ok, {time.monotonic() - begin:.0f} s", flush=True)
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
