"""Recording runs on an MLflow server that asks for a user and a password."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from servers import answers, free_port, wait_until

from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking import Tracking, TrackingError, ensure_store

EXPERIMENT = Experiment.model_validate({"name": "guarded", "method": {"name": "fedit"}})
PASSWORD = secrets.token_hex(16)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Start ``mlflow server --app-name basic-auth`` with a password of its own, as docs/security.md says."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    folder = tmp_path_factory.mktemp("server")
    ensure_store(f"sqlite:///{folder}/mlflow.db")
    port = str(free_port())
    variables = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", port, "--workers", "1", "--artifacts-destination", str(folder / "artifacts")],
            cwd=folder,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), process, folder / "log")
        yield f"127.0.0.1:{port}"
        assert PASSWORD not in (folder / "log").read_text()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # MLflow also looks for ~/.mlflow/credentials


def test_a_run_is_recorded_with_user_and_password(server, no_credentials, monkeypatch):
    """From variables or from the URI; nothing that is recorded holds the password."""
    with Tracking(f"http://admin:{PASSWORD}@{server}").run(EXPERIMENT) as run:
        run.log(1, {"eval/accuracy": 0.5})
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with Tracking(f"http://{server}").run(EXPERIMENT) as again:
        again.log(1, {"eval/accuracy": 0.5})
    client = MlflowClient(f"http://{server}")
    found = [client.get_run(one.run_id) for one in (run, again)]

    assert [one.info.status for one in found] == ["FINISHED", "FINISHED"]
    assert PASSWORD not in str([(one.data.params, one.data.tags, one.info.artifact_uri) for one in found])


def test_a_wrong_password_is_one_line(server, no_credentials, monkeypatch):
    """Also none at all. It says where, and does not repeat what was sent."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    for uri in (f"http://admin:mistaken@{server}", f"http://{server}"):
        with pytest.raises(TrackingError, match=r"user and password.*MLFLOW_TRACKING_PASSWORD") as refused:
            Tracking(uri)
        assert server in str(refused.value)
        assert "mistaken" not in str(refused.value)
        assert "\n" not in str(refused.value)
