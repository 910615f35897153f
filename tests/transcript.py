"""What is typed and answered when a job runs on a cluster of unequal nodes, is stopped, and goes on: a transcript.

python tests/transcript.py        # prints the Markdown of docs/how-to/cluster.md, "From the first command to the last"

The head has no CPUs; three nodes on this machine each declare something of their own, and each profile is pinned to
one of them. Ids, times and what nobody reads twice differ from run to run.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from commands import fedloom, make_world, started
from heads import BIN, TOKEN, free_port, started_head

NODES = {"gpu-server": '{"big": 1}', "workstation": '{"rtx": 2}', "phone": '{"npu": 1}'}
PROFILES = [
    {"name": "large", "share": 2, "rank": 8, "num_cpus": 0.5, "resources": {"big": 1}},
    {"name": "medium", "share": 1, "rank": 4, "num_cpus": 0.5, "resources": {"rtx": 2}},
    {"name": "small", "share": 3, "rank": 2, "num_cpus": 0.5, "resources": {"npu": 1}},
]
ROUNDS = 12
STOPPED_AFTER = "round 4/"
TIMEOUT_S = 600
SHOWN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@contextlib.contextmanager
def joined(head, folder):
    """Let three nodes join a head, until the block ends."""
    processes = []
    environment = os.environ | SHOWN | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    try:
        for name, resources in NODES.items():
            command = [f"{BIN}/ray", "start", "--address", head.address, "--block", "--node-name", name]
            command += ["--num-cpus", "1", "--resources", resources]
            command += ["--dashboard-agent-listen-port", str(free_port()), "--disable-usage-stats"]
            log = (folder / f"{name}.log").open("w+")
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
            )
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def world(folder):
    """Fill the folder that the nodes share: model, data, an experiment that pins its profiles."""
    make_world(folder)
    document = yaml.safe_load((folder / "mine.yaml").read_text())
    document |= {"rounds": ROUNDS, "model": {"name": f"{folder}/model"}, "population": {"profiles": PROFILES}}
    document["data"]["source"] = f"{folder}/rows.jsonl"
    document["cohort"] = {"size": 6}
    (folder / "reviews.yaml").write_text(yaml.safe_dump(document))


class Terminal:
    """Runs commands in a folder against a cluster, and prints both sides."""

    def __init__(self, folder, head):
        self._folder = folder
        self._head = head

    def typed(self, *arguments):
        """Run a command to its end; returns what it answers."""
        ended = fedloom(*arguments, "--address", self._head.jobs, cwd=self._folder, **SHOWN)
        assert ended.returncode == 0, ended.stderr
        self._show(arguments, ended.stdout + ended.stderr)
        return ended.stdout.strip()

    def followed(self, job, *, until=None):
        """Follow a job's logs to their end, or to a line that holds a text; returns all lines."""
        arguments = ("logs", job, "--follow")
        process = started(*arguments, "--address", self._head.jobs, cwd=self._folder, **SHOWN)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until is not None and until in line:
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=TIMEOUT_S)
        self._show(arguments, "".join(lines))
        return lines

    def _show(self, arguments, answer):
        command = " ".join(["$ fedloom", *map(str, arguments)])
        for long, short in ((str(self._folder), "/shared"), (self._head.jobs, "http://head:8265")):
            command, answer = command.replace(long, short), answer.replace(long, short)
        print(f"{command}\n{answer.rstrip()}\n", flush=True)


def placed(folder, run):
    """Count who was trained where, from the run's ledger."""
    (ledger,) = (folder / "fedloom-runs").rglob(f"{run}*/artifacts/ledger.parquet")
    table = pq.read_table(ledger).to_pydict()
    return Counter(zip(table["profile"], table["node"], strict=True))


def main():
    """Print the transcript and the placement."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "cluster")
        folder.mkdir()
        world(folder)
        with started_head(num_cpus=0, dashboard=True) as head, joined(head, folder):
            terminal = Terminal(folder, head)
            print("```text")
            job = terminal.typed("submit", "reviews.yaml", "--folder", folder).splitlines()[-1]
            terminal.followed(job, until=STOPPED_AFTER)
            terminal.typed("stop", job)
            said = terminal.followed(job)
            (run,) = {path.parent.name for path in (folder / "fedloom-runs" / "checkpoints").glob("*/run.json")}
            job = terminal.typed("submit", "--resume", run[:8], "--folder", folder).splitlines()[-1]
            said = terminal.followed(job)
            terminal.typed("status", job)
            terminal.typed("jobs")
            print("```")
        first, *_, last = [int(number) for number in re.findall(r"round (\d+)/", "".join(said))]
        assert (first, last) == (5, ROUNDS) or (first > 5 and last == ROUNDS), said
        print("\n| profile | node | clients trained |\n|---|---|---|")
        for (profile, node), count in sorted(placed(folder, run).items()):
            print(f"| {profile} | {node} | {count} |")


if __name__ == "__main__":
    main()
