"""Stores that many processes write at once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import postgres
import pytest
from mlflow import MlflowClient
from servers import free_port

from fedloom.platform.tracking import DEFAULT_FOLDER, Tracking, TrackingError

# MLflow still uses a loader of SQLAlchemy that SQLAlchemy no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 120.0
PROCESSES, ROUNDS, METRICS = 6, 20, 6

# One line for each run: its store's number, its own and its id. What a process is told of an error is its stderr.
RECORDERS = f"""
import os, sys, traceback
import fedloom.platform.experiment_file, mlflow.store.tracking.sqlalchemy_store  # slow to import: once for all
from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking import Tracking

def record(store, number):
    try:
        with Tracking(sys.argv[1 + store] or None).run(Experiment(seed=number)) as run:
            for step in range({ROUNDS}):
                run.log(step, {{f"eval/m{{index}}": 100 * number + step + index / 100 for index in range({METRICS})}})
            run.files("plots", {{f"{{number}}.png": bytes([number])}})
        print(store, number, run.run_id, flush=True)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(0)

for store in range(len(sys.argv) - 1):
    pids = [os.fork() or record(store, number) for number in range({PROCESSES})]
    for pid in pids:
        os.waitpid(pid, 0)
"""


def check(client: MlflowClient, run_ids: list[str]) -> None:
    """Every process has a run that ended well, with its files, and every point once with its value."""
    assert len(run_ids) == PROCESSES
    for number, run_id in enumerate(run_ids):
        stored = client.get_run(run_id)
        assert stored.info.status == "FINISHED"
        assert stored.data.params["seed"] == str(number)
        assert [entry.path for entry in client.list_artifacts(run_id, "plots")] == [f"plots/{number}.png"]
        for index in range(METRICS):
            points = client.get_metric_history(run_id, f"eval/m{index}")
            assert [(point.step, point.value) for point in points] == [
                (step, 100 * number + step + index / 100) for step in range(ROUNDS)
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What the processes have done: the working directory, all that they said, and the run of each by store."""

    folder: Path
    complaints: str
    runs: dict[int, list[str]]


@pytest.fixture(scope="module")
def database() -> Iterator[str | None]:
    with postgres.server() as uri:
        yield uri


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, database: str | None) -> Recorded:
    """Let processes record at once into the new SQLite file of a working directory, then into an empty database."""
    folder = tmp_path_factory.mktemp("work")
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    done = subprocess.run(
        [sys.executable, "-c", RECORDERS, "", *filter(None, [database])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    lines = sorted(done.stdout.split()[number : number + 3] for number in range(0, len(done.stdout.split()), 3))
    runs = {store: [run_id for at, _, run_id in lines if int(at) == store] for store in (0, 1)}
    return Recorded(folder=folder, complaints=done.stderr, runs=runs)


@pytest.mark.slow
def test_many_processes_begin_and_record_at_once_in_sqlite(recorded: Recorded):
    """Nobody is refused by a lock; all that they leave is the one folder."""
    assert recorded.complaints == ""
    check(MlflowClient(tracking_uri=f"sqlite:///{recorded.folder}/{DEFAULT_FOLDER}/mlflow.db"), recorded.runs[0])
    assert [path.name for path in recorded.folder.iterdir()] == [DEFAULT_FOLDER]


@pytest.mark.slow
def test_many_processes_begin_and_record_at_once_in_postgresql(recorded: Recorded, database: str | None):
    if database is None:
        pytest.skip(postgres.MISSING)
    check(MlflowClient(tracking_uri=database), recorded.runs[1])


def test_a_database_that_cannot_be_used_is_one_line_without_its_password(monkeypatch: pytest.MonkeyPatch):
    """Nobody listens, or the driver is missing."""
    uri = f"postgresql+{{}}://user:secret@127.0.0.1:{free_port()}/runs"
    pytest.importorskip("psycopg")
    with pytest.raises(TrackingError, match=r"postgresql\+psycopg://\*\*\*@.*refused") as caught:
        Tracking(uri.format("psycopg"))
    assert "secret" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # what Python keeps for a module that is not there
    with pytest.raises(TrackingError, match=r"driver is missing.*fedloom\[postgres\]") as caught:
        Tracking(uri.format("psycopg2"))
    assert "secret" not in str(caught.value)
