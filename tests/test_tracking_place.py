"""Where runs are recorded: what is taken for a store, how it is made, and what is none."""

import socket
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from runs_on_record import default_store

from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking import (
    DEFAULT_FOLDER,
    Tracking,
    TrackingError,
    ensure_store,
    tracking_uri,
    ui_command,
)
from fedloom.platform.tracking_store import sqlite_file

# MLflow still uses a loader of SQLAlchemy that SQLAlchemy no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")
EXPERIMENT = Experiment()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """Return a new default store: the only one of this file whose tables are migrated in this process."""
    place = tmp_path_factory.mktemp("work")
    (place / DEFAULT_FOLDER).mkdir()
    (place / DEFAULT_FOLDER / ".mlflow.db.new").write_bytes(
        b"half of a database"
    )  # what a killed process leaves behind
    return default_store(place)


@pytest.fixture
def client(tracking: Tracking) -> MlflowClient:
    """Return a reader of our own, so that what is checked is what lies in the store."""
    return MlflowClient(tracking_uri=tracking.uri)


def test_the_store_is_what_is_given_else_the_environment_else_a_file_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == f"sqlite:///{tmp_path}/fedloom-runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(None) == "http://tracker:5000"
    assert tracking_uri("databricks") == "databricks"
    assert tracking_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"
    assert tracking_uri("sqlite:////data/runs.db?timeout=9") == "sqlite:////data/runs.db?timeout=9"
    assert tracking_uri("sqlite:////data/100%25/a%3Fb.db") == "sqlite:////data/100%25/a%3Fb.db"
    assert tracking_uri("sqlite:///:memory:") == "sqlite:///:memory:"
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_no_uri_and_the_right_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=f"'runs' is no URI.*sqlite:///{tmp_path}/runs/mlflow.db"):
        tracking_uri("runs")


def test_two_trackings_share_one_list_of_runs(tracking: Tracking, client: MlflowClient):
    """The MLflow experiment is made once and found again."""
    with Tracking(tracking.uri).run(EXPERIMENT) as second, tracking.run(EXPERIMENT) as first:
        pass
    ids = {client.get_run(run.run_id).info.experiment_id for run in (first, second)}
    assert len(ids) == 1


def test_a_deleted_experiment_is_not_written_to(tracking: Tracking, client: MlflowClient):
    client.delete_experiment(Tracking(tracking.uri, experiment_name="old")._experiment_id)
    with pytest.raises(TrackingError, match=r"'old' was deleted.*mlflow experiments restore"):
        Tracking(tracking.uri, experiment_name="old")


def test_a_store_that_cannot_be_used_is_one_line_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """No server, no database, no folder, no such scheme: MLflow alone would try for minutes, or print tracebacks."""
    started = time.monotonic()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = unused.getsockname()[1]
        with pytest.raises(TrackingError, match=r"http://\*\*\*@127.0.0.1:\d+ does not answer: .*refused") as caught:
            Tracking(f"http://user:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("these are no runs")
    with pytest.raises(TrackingError, match="is no SQLite database"):
        Tracking(f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(TrackingError, match=r"Not a directory|File exists"):
        Tracking(f"sqlite:///{tmp_path}/notes.txt/mlflow.db")
    with pytest.raises(TrackingError, match="tracking store ftp://runs"):
        Tracking("ftp://runs")
    assert time.monotonic() - started < 20
    assert capfd.readouterr() == ("", "")


def test_a_store_is_made_as_a_whole_and_once(tracking: Tracking, client: MlflowClient):
    """Half a database that lay beside it was thrown away; a store that is there is not touched again."""
    database = sqlite_file(tracking.uri)
    assert not database.with_name(".mlflow.db.new").exists()
    before = database.stat()
    ensure_store(tracking.uri)
    after = database.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert client.get_experiment("0").artifact_location == f"{(database.parent / 'artifacts').as_uri()}/0"


def test_the_ui_is_for_stores_without_a_server(tracking: Tracking, tmp_path: Path):
    with pytest.raises(TrackingError, match="open it in a browser"):
        ui_command("http://tracker:5000")
    with pytest.raises(TrackingError, match=r"no runs are recorded in .*mlflow\.db"):
        ui_command(f"sqlite:///{tmp_path}/mlflow.db")
    command, variables = ui_command(tracking.uri, port=5001)
    assert variables == {"MLFLOW_BACKEND_STORE_URI": tracking.uri}
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5001"
