"""What is typed and answered when a job runs on a cluster of unequal nodes, is stopped, and goes on: a transcript.

python tests/transcript.py        # prints the Markdown of docs/how-to/cluster.md, "From the first command to the last"

The head has no CPUs; three nodes on this machine each declare something of their own, and each profile is pinned to
one of them. Ids, times and what nobody reads twice differ from run to run.
"""

import contextlib
import os
import re
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from commands import fedloom, make_world, started
from heads import BIN, TOKEN
from servers import free_port

NODES = {"gpu-server": {"big": 1}, "workstation": {"rtx": 2}, "phone": {"npu": 1}}
PROFILES = [
    {"name": "large", "share": 2, "rank": 8, "num_cpus": 0.5, "resources": {"big": 1}},
    {"name": "medium", "share": 1, "rank": 4, "num_cpus": 0.5, "resources": {"rtx": 2}},
    {"name": "small", "share": 3, "rank": 2, "num_cpus": 0.5, "resources": {"npu": 1}},
]
ROUNDS = 300
STOPPED_AFTER = "round 20/"
LINES = 4  # that are shown of a log's begin and of its end
TIMEOUT_S = 600
SHOWN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@contextlib.contextmanager
def cluster():
    """Run a head with a job server and three nodes, until the block ends; yields the address of the job server."""
    os.environ.update(SHOWN | {"PATH": f"{BIN}:{os.environ['PATH']}"})
    from ray.cluster_utils import Cluster

    port = free_port()
    ports = {"dashboard_port": port, "dashboard_agent_listen_port": free_port()}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, **ports})
    try:
        for name, resources in NODES.items():
            agent = {"dashboard_agent_listen_port": free_port()}
            nodes.add_node(num_cpus=1, node_name=name, resources=resources, **agent)
        nodes.wait_for_nodes()
        yield f"http://127.0.0.1:{port}"
    finally:
        nodes.shutdown()


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

    def __init__(self, folder, jobs):
        self._folder = folder
        self._jobs = jobs

    def typed(self, *arguments):
        """Run a command to its end; returns what it answers."""
        ended = fedloom(*arguments, "--address", self._jobs, cwd=self._folder, **SHOWN)
        assert ended.returncode == 0, ended.stderr
        self._show(arguments, ended.stdout + ended.stderr)
        return ended.stdout.strip()

    def followed(self, job, *, until=None):
        """Follow a job's logs to their end, or to a line that holds a text; returns all lines."""
        arguments = ("logs", job, "--follow")
        process = started(*arguments, "--address", self._jobs, cwd=self._folder, **SHOWN)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until is not None and until in line:
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=TIMEOUT_S)
        left_out = ["...\n"] if len(lines) > 2 * LINES else []
        self._show(arguments, "".join(lines[:LINES] + left_out + lines[LINES:][-LINES:]))
        return lines

    def _show(self, arguments, answer):
        command = " ".join(["$ fedloom", *map(str, arguments)])
        for long, short in ((str(self._folder), "/shared"), (self._jobs, "http://head:8265")):
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
        with cluster() as jobs:
            terminal = Terminal(folder, jobs)
            print("```text", flush=True)
            job = terminal.typed("submit", "reviews.yaml", "--folder", folder).splitlines()[-1]
            terminal.followed(job, until=STOPPED_AFTER)
            terminal.typed("stop", job)
            said = terminal.followed(job)
            (run,) = {path.parent.name for path in (folder / "fedloom-runs" / "checkpoints").glob("*/run.json")}
            assert f"go on with: fedloom submit --resume {run[:8]} --folder {folder}\n" in said, said
            job = terminal.typed("submit", "--resume", job).splitlines()[-1]
            said = terminal.followed(job)
            terminal.typed("status", job)
            terminal.typed("jobs")
            print("```")
        first, *_, last = [int(number) for number in re.findall(r"round (\d+)/", "".join(said))]
        assert first > 20, said
        assert last == ROUNDS, said
        print("\n| profile | node | clients trained |\n|---|---|---|")
        for (profile, node), count in sorted(placed(folder, run).items()):
            print(f"| {profile} | {node} | {count} |")


if __name__ == "__main__":
    main()
