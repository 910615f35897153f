"""A tracking server that goes away during a run: one that comes back costs nothing, one that stays away ends the run.

The server is the one of docker/: its entry point, run as the image's user where this process is root, over PostgreSQL
where that is installed, else over SQLite.
"""

import contextlib
import http.client
import http.server
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from mlflow import MlflowClient
from servers import DEADLINE_S, free_port, wait_until
from small import make_data, make_experiment, save_llama

from fedloom.jobs.runs import execute
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.tracked_run import TrackedRun
from fedloom.platform.tracking import Tracking, TrackingError

pytestmark = [pytest.mark.filterwarnings("ignore:.*noload.*"), pytest.mark.slow]

DOCKER = Path(__file__).resolve().parents[1] / "docker"
USER = 1000  # the image's


def image_user(variables: dict[str, str]) -> tuple[dict[str, object], str]:
    """Return how a process is started as the image's user, and a Python that this user may run and that has MLflow.

    Only root can start one; where no Python is open to the user, and without root, it is us and our own.
    """
    account: dict[str, object] = {"user": USER, "group": USER, "extra_groups": []}
    check = "import importlib.util, os, sys; os.stat(sys.argv[1]); sys.exit(not importlib.util.find_spec('mlflow'))"
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        command = [python, "-c", check, str(DOCKER / "entrypoint.sh")]
        with contextlib.suppress(OSError):
            if (
                subprocess.run(command, cwd="/", env=variables, capture_output=True, check=False, **account).returncode
                == 0
            ):
                return account, python
    return {}, sys.executable


class Server:
    """MLflow's server as docker/ starts it, which can be killed and started again on its port."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        self._folder = folder
        libraries = os.pathsep.join([sysconfig.get_path("purelib"), os.environ.get("PYTHONPATH", "")])
        self.account, python = image_user(os.environ | {"PYTHONPATH": libraries})
        (folder / "mlflow").write_text(f"#!{python}\nfrom mlflow.cli import cli\ncli()\n")
        (folder / "mlflow").chmod(0o755)
        if self.account:
            os.chown(folder, USER, USER)
        self.environment = os.environ | {
            "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
            "PYTHONPATH": libraries,
            "HOME": str(folder),
            "FEDLOOM_ROLE": "mlflow",
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "files"),
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow:*,127.0.0.1:*",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and come back at once."""
        with self._log.open("a") as log:
            command = [str(DOCKER / "entrypoint.sh")]
            where = {"cwd": self._folder, "env": self.environment, "start_new_session": True}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **where, **self.account)

    def healthy(self) -> bool:
        """Ask docker/'s own check."""
        done = subprocess.run([str(DOCKER / "health.sh")], env=self.environment, capture_output=True, check=False)
        return done.returncode == 0

    def wait(self) -> None:
        """Come back once it is up."""
        assert self.process is not None
        wait_until(self.healthy, self.process, self._log)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # pytest's own folders are for this user alone
    with tempfile.TemporaryDirectory(prefix="fedloom-server-") as folder, postgres.server() as database:
        server = Server(Path(folder), database or f"sqlite:///{folder}/mlflow.db")
        try:
            server.start()
            server.wait()
            yield server
        finally:
            server.kill()


class Proxy(http.server.ThreadingHTTPServer):
    """A way to the server that passes requests on, and loses the answers to some of them."""

    def __init__(self, server: Server, port: int = 0) -> None:
        self.port = server.port
        self.losses: Counter[str] = Counter()  # by the end of the path
        super().__init__(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def pass_on(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=DEADLINE_S)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        end = self.path.partition("?")[0].rpartition("/")[2]
        if self.server.losses[end]:
            self.server.losses[end] -= 1
            return  # the server has done it, and nobody is told
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = pass_on  # noqa: N815 - names of the standard library

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def proxied(server: Server, port: int = 0) -> Iterator[Proxy]:
    with Proxy(server, port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return make_experiment(save_llama(tmp_path_factory.mktemp("models") / "llama"), rounds=3, cohort={"size": 3})


def finished_run(experiment: Experiment, tracking: Tracking, *, resume: str | None = None) -> str:
    """Run an experiment in this process, or go on with a run; return its id."""
    prepared = assemble(experiment, make_data())
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    return execute(experiment, prepared, executor, tracking, resume=resume)[0]


def once_each(client: MlflowClient, run_id: str, rounds: int) -> None:
    """The run has ended well, and the loss of every round stands once."""
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    for name in ("eval/loss", "train/loss"):
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert steps == list(range(int(name == "train/loss"), rounds + 1))
    assert "ledger.parquet" in [entry.path for entry in client.list_artifacts(run_id)]


def before(monkeypatch: pytest.MonkeyPatch, name: str, step: int, deed) -> None:
    """Do a deed before the first call of a run's method with this step."""
    real, done = getattr(TrackedRun, name), []

    def call(self, at, *arguments):
        if at == step and not done:
            done.append(at)
            deed()
        return real(self, at, *arguments)

    monkeypatch.setattr(TrackedRun, name, call)


def test_a_run_outlasts_a_server_that_is_killed_and_comes_back(
    server: Server, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """The second round is logged while nobody listens on the port: no point is missing and none stands twice."""
    monkeypatch.chdir(tmp_path)

    def replace() -> None:
        server.kill()
        server.start()

    before(monkeypatch, "log", 2, replace)
    run_id = finished_run(experiment, Tracking(server.address, outage_limit_s=DEADLINE_S))
    once_each(MlflowClient(server.address), run_id, experiment.rounds)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fedloom")]
    assert len(said) == 2
    assert "trying again for up to 120 s" in said[0]
    assert "answers again after" in said[1]


def test_a_server_that_stays_away_ends_the_run_which_then_goes_on(
    server: Server, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The error names the limit and the command; after it, every point stands once."""
    monkeypatch.chdir(tmp_path)
    with proxied(server) as proxy:

        def leave() -> None:
            proxy.shutdown()
            proxy.server_close()

        before(monkeypatch, "log", 2, leave)
        with pytest.raises(TrackingError, match=r"refused.*tried for 1 s") as caught:
            finished_run(experiment, Tracking(proxy.address, outage_limit_s=1))
    notes = " ".join(caught.value.__notes__)
    client = MlflowClient(server.address)
    (run_id,) = [path.parent.name for path in tmp_path.glob("fedloom-runs/checkpoints/*/run.json")]
    assert f"go on with: fedloom resume {run_id[:8]}" in notes
    assert "FAILED could not be recorded" in notes
    assert client.get_run(run_id).info.status == "RUNNING"
    with proxied(server, proxy.server_port) as back:
        assert finished_run(experiment, Tracking(back.address), resume=run_id) == run_id
    once_each(client, run_id, experiment.rounds)


def test_a_call_whose_answer_is_lost_is_made_again_and_counts_once(server: Server, tmp_path: Path):
    """The server has done what nobody was told of: one run, one point of each step, one file."""
    with proxied(server) as proxy:
        tracking = Tracking(proxy.address, experiment_name="lost answers")
        proxy.losses = Counter({"create": 1, "log-batch": 1, "experiment.yaml": 1, "set-tag": 1, "update": 1})
        with tracking.run(Experiment()) as run:
            run.tag("kept", "yes")
            for step in range(3):
                proxy.losses["log-batch"] += 1
                run.log(step, {"eval/loss": 1.0, "bytes/total": float("nan")})
        assert not +proxy.losses
    client = MlflowClient(server.address)
    (only,) = client.search_runs([client.get_experiment_by_name("lost answers").experiment_id])
    assert (only.info.run_id, only.info.status, only.data.tags["kept"]) == (run.run_id, "FINISHED", "yes")
    for name in ("eval/loss", "bytes/total"):
        assert [point.step for point in client.get_metric_history(run.run_id, name)] == [0, 1, 2]


def test_the_server_runs_as_the_images_user_and_answers_to_its_names_alone(server: Server):
    """What docker/compose.yaml calls it is let in; a page that has had its name point here is not."""
    assert server.process is not None
    assert Path(f"/proc/{server.process.pid}").stat().st_uid == server.account.get("user", os.geteuid())
    for host, status in ((f"mlflow:{server.port}", 200), ("elsewhere.example", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
        connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()
