"""Passwords and tokens go to whom they are meant for and nowhere else; who has none is not let in."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, make_world
from hostile import tries
from hypothesis import given
from hypothesis import strategies as st
from strangers import NO_CHOICE, joining, refused

from fedloom.platform import run_folder
from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking import Tracking
from fedloom.platform.tracking_calls import TrackingError, shown_uri, without_secrets
from fedloom.platform.tracking_store import tracking_uri, ui_command

EXPERIMENT = Experiment.model_validate({"name": "secret", "method": {"name": "fedit"}})
NAME = st.text("abcXYZ019-_.~%!$", min_size=8, max_size=20).map(lambda word: f"me{word}")
WORD = st.text("abcXYZ019-_.~%:!$", min_size=8, max_size=20).map(lambda word: f"S3{word}")
CANARIES = {
    "HF_TOKEN": "hf_canary_of_the_hub_0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary+of/a+cloud+0123456789",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-tracker-0123456789",
    "RAY_AUTH_TOKEN": "canaryofthecluster0123456789abcdef",
}
# Runs an experiment, says what its processes listen on, and waits.
RUN = """
import json
from pathlib import Path
import psutil, ray
from fedloom.jobs.runs import execute, open_executor
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.preparation import prepare
from fedloom.platform.tracking import Tracking
prepared = prepare(load_experiment(Path("mine.yaml")))
with open_executor(prepared.experiment, prepared) as place:
    execute(prepared.experiment, prepared, place, Tracking(None))
    me = psutil.Process()
    found = [(c.laddr.ip, p.name()) for p in (me, *me.children(recursive=True))
             for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    print(json.dumps({"listening": found, "address": ray.get_runtime_context().gcs_address}), flush=True)
    input()
"""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run on an embedded cluster has left behind, and whom it let in."""

    listening: list[tuple[str, str]]
    refusal: str
    contents: dict[str, bytes]
    home: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """Run one experiment with secrets planted in its environment, and let a stranger try to join its cluster."""
    folder, home = make_world(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("home")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as session:  # Ray's sockets have room for a short path
        variables = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": session, "HOME": str(home)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=folder,
            env=NO_CHOICE | CANARIES | variables,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
        )
        try:
            lines = list(until_json(process.stdout))
            assert lines, process.communicate(timeout=100)[1].decode()[-2000:]
            said = json.loads(lines[-1])
            refusal = refused(joining(said["address"], RAY_AUTH_TOKEN="another"))
            output, errors = process.communicate(b"\n", timeout=100)
            assert process.returncode == 0, errors.decode()[-2000:]
        finally:
            process.kill()
        files = [path for root in (folder, Path(session), home) for path in root.rglob("*") if path.is_file()]
        contents = {str(path): path.read_bytes() for path in files}
    contents |= {"output": b"".join(lines) + output, "errors": errors}
    return Ran(
        listening=said["listening"], refusal=refusal, contents=contents, home=[path.name for path in home.iterdir()]
    )


def until_json(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines up to the first JSON object."""
    for line in stream:
        yield line
        if line.startswith(b"{"):
            return


@tries(20)
@given(user=NAME, password=WORD, options=st.sampled_from(["", "?password={}", "?sslpassword={}&x=1"]))
def test_what_is_shown_of_a_uri_holds_no_password(user, password, options):
    """Neither the URI as messages name it, nor what a library says in which it stands."""
    for scheme in ("http", "https", "postgresql", "mysql+pymysql"):
        uri = f"{scheme}://{user}:{password}@host:5000/path{options.format(password)}"
        said = without_secrets(f"cannot open {uri}, i.e. {password!r} of {user}:{password}", uri)

        assert password not in shown_uri(uri)
        assert password not in said
        assert "host:5000/path" in shown_uri(uri)
    with pytest.raises(TrackingError) as refused:
        tracking_uri(f"{user}:{password}@host")
    assert password not in str(refused.value)


def test_a_uri_without_secrets_is_shown_as_it_is():
    for uri in ("http://host:5000", "databricks", "sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/x.db?timeout=3"):
        assert uri == shown_uri(uri)


def test_a_run_folder_holds_no_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("http://me:S3cret@host", "postgresql://host/db?password=S3cret"):
        run_folder.folder_of("1").mkdir(parents=True, exist_ok=True)
        run_folder.describe("1", EXPERIMENT, fingerprint="f", tracking_uri=uri)
        text = (run_folder.folder_of("1") / run_folder.DESCRIPTION).read_text()

        assert "S3cret" not in text
        assert run_folder.find("1").tracking_uri is None


def test_a_command_line_holds_no_password():
    command, variables = ui_command("postgresql://me:S3cret@host/db")

    assert "S3cret" not in " ".join(command)
    assert "S3cret" in variables["MLFLOW_BACKEND_STORE_URI"]


@pytest.mark.parametrize("uri", ["http://admin:password1234@127.0.0.1:1", "http://127.0.0.1:1"])
def test_the_password_that_mlflow_once_came_with_is_refused(uri, monkeypatch):
    """It is refused before anything is sent: nobody listens at this address."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password1234")
    with pytest.raises(TrackingError, match="which everybody knows") as refused:
        Tracking(uri)
    assert "password1234" not in str(refused.value)


@pytest.mark.ray
def test_an_embedded_cluster_listens_on_loopback_alone(ran):
    """Every TCP port of every one of its processes, by the kernel's own account."""
    assert {"127.0.0.1"} == {ip.removeprefix("::ffff:") for ip, _ in ran.listening}
    assert {"gcs_server", "raylet"} <= {name for _, name in ran.listening}


@pytest.mark.ray
def test_an_embedded_cluster_lets_nobody_else_in(ran):
    """Other users of the machine can reach its ports. Its token is not left in the home folder either."""
    assert "asks for another token" in ran.refusal
    assert ".ray" not in ran.home


@pytest.mark.ray
def test_no_file_that_a_run_makes_holds_a_secret(ran):
    """Neither the run folder, MLflow's store, Ray's session, nor what is printed."""
    names = {Path(place).name for place in ran.contents}
    found = [
        (name, place)
        for name, secret in CANARIES.items()
        for place, content in ran.contents.items()
        if secret.encode() in content
    ]

    assert {"mlflow.db", "run.json", "raylet.out", "progress.json", "adapter_config.json"} <= names
    assert not found
