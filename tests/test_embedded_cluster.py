"""A run on a cluster of its own: what it says, where it listens, whom it lets in, what Ctrl-C leaves."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import ROOT, make_world
from mlflow import MlflowClient
from strangers import NO_CHOICE, joining, refused

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

CANARIES = {
    "HF_TOKEN": "hf_canary_of_the_hub_0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary+of/a+cloud+0123456789",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-tracker-0123456789",
    "RAY_AUTH_TOKEN": "canaryofthecluster0123456789abcdef",
}
UNSET = {"RAY_USAGE_STATS_ENABLED": "", "TRANSFORMERS_VERBOSITY": ""}  # what tests set and users do not
COMMAND = ("-m", "fedloom.jobs.main", "run", "mine.yaml", "--executor", "ray", "--set", "rounds=100000")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What was seen of the run while it lasted, and what it has left behind."""

    listening: set[tuple[str, str]]
    refusal: str
    code: int
    output: str
    errors: str
    left: list[list[str]]
    folder: Path
    contents: dict[str, bytes]
    home: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run an experiment of many rounds, look at it after the second, and press Ctrl-C."""
    folder, home = make_world(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("home")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as session:  # Ray's sockets have room for a short path
        variables = UNSET | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": session, "HOME": str(home)}
        process = subprocess.Popen(
            [sys.executable, *COMMAND],
            cwd=folder,
            env=NO_CHOICE | CANARIES | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("flexlora: round 2/"):
                    break
            assert process.poll() is None, process.communicate()[1]
            listening = ports_of(psutil.Process(process.pid))
            refusal = refused(joining(address_of(process.pid), RAY_AUTH_TOKEN="another"))
            os.killpg(process.pid, signal.SIGINT)  # as from a terminal
            output, errors = process.communicate(timeout=100)
            left = session_members(process.pid)
        finally:
            process.kill()
        files = [path for root in (folder, Path(session), home) for path in root.rglob("*") if path.is_file()]
        contents = {str(path): path.read_bytes() for path in files}
    output = "".join(lines) + output
    contents |= {"output": output.encode(), "errors": errors.encode()}
    return Ran(
        listening=listening,
        refusal=refusal,
        code=process.returncode,
        output=output,
        errors=errors,
        left=left,
        folder=folder,
        contents=contents,
        home=[path.name for path in home.iterdir()],
    )


def ports_of(driver: psutil.Process) -> set[tuple[str, str]]:
    """Return address and process of every TCP port on which the driver or a process under it listens."""
    return {
        (connection.laddr.ip.removeprefix("::ffff:"), process.name())
        for process in (driver, *driver.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def address_of(driver: int) -> str:
    """Return where the cluster under a driver is joined, which it tells nobody but its own processes."""
    flag = "--gcs-address="
    words = [word for process in psutil.Process(driver).children(recursive=True) for word in process.cmdline()]
    return next(word.removeprefix(flag) for word in words if word.startswith(flag))


def session_members(session: int) -> list[list[str]]:
    """List the live processes of a session: Ray's daemons and workers belong to that of their driver."""
    listed = subprocess.run(["ps", "-eo", "sess=,pid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listed.stdout.splitlines()]
    return [row for row in rows if row[0] == str(session) and not row[2].startswith("Z")]


def test_it_speaks_of_nothing_but_itself(ran):
    """No stray line of a library in the user's terminal: rounds, and what Ctrl-C has done."""
    lines = ran.output.splitlines()
    assert [line[:17] for line in lines[:3]] == [f"flexlora: round {n}" for n in range(3)]
    assert all(line.startswith("flexlora: round ") for line in lines)
    assert re.fullmatch(
        r"interrupted\ngo on with: fedloom resume \w{8}\nthe MLflow run is marked KILLED\n", ran.errors
    ), ran.errors


def test_ctrl_c_leaves_no_process_and_a_run_marked_as_killed(ran):
    """The whole process group gets the signal; all Ray processes are gone afterwards."""
    assert ran.code == 130
    assert ran.left == []
    client = MlflowClient(tracking_uri=f"sqlite:///{ran.folder}/fedloom-runs/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "KILLED"


def test_it_listens_on_loopback_alone(ran):
    """Every TCP port of every one of its processes, by the kernel's own account."""
    assert {"127.0.0.1"} == {ip for ip, _ in ran.listening}
    assert {"gcs_server", "raylet"} <= {name for _, name in ran.listening}


def test_it_lets_nobody_else_in(ran):
    """Other users of the machine can reach its ports. Its token is not left in the home folder either."""
    assert "asks for another token" in ran.refusal
    assert ".ray" not in ran.home


def test_no_file_that_it_makes_holds_a_secret(ran):
    """Neither the run folder, MLflow's store, Ray's session, nor what is printed."""
    names = {Path(place).name for place in ran.contents}
    found = [
        (name, place)
        for name, secret in CANARIES.items()
        for place, content in ran.contents.items()
        if secret.encode() in content
    ]

    assert {"mlflow.db", "run.json", "raylet.out", "progress.json", "experiment.yaml"} <= names
    assert not found
