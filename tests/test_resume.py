"""``fedloom resume``: processes that are killed outright go on in the same MLflow run, to the same bits."""

import contextlib
import json
import signal
from pathlib import Path

import pytest
from commands import make_world, started
from mlflow import MlflowClient
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.platform.errors import CheckpointError
from fedloom.platform.run_folder import find

SMALL = ("--executor", "local", "--set", "rounds=5", "--set", "method.name=florist")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nobody has disturbed."""
    world = make_world(tmp_path_factory.mktemp("undisturbed"))
    inside(world, "run", "mine.yaml", *SMALL)
    return world


@pytest.fixture(scope="module")
def undisturbed(whole):
    return on_record(whole)


def inside(world, *arguments, exit_code=0):
    """Run the command line in this process, which has imported everything already; returns its errors."""
    with contextlib.chdir(world):
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == exit_code, done.output
    return done


@pytest.fixture
def world(tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    return make_world(folder)


def on_record(world):
    """Return all of the only run that does not depend on real time: status, every point, parameters, artifacts."""
    client = MlflowClient(tracking_uri=f"sqlite:///{world}/fedloom-runs/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = sorted(name for name in run.data.metrics if name != "seconds")
    points = {
        name: [(point.step, repr(point.value)) for point in client.get_metric_history(run.info.run_id, name)]
        for name in names
    }
    folder = Path(client.download_artifacts(run.info.run_id, "adapters/final"))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    files = sorted(item.path for item in client.list_artifacts(run.info.run_id))
    seconds = [point.step for point in client.get_metric_history(run.info.run_id, "seconds")]
    return {
        "status": run.info.status,
        "points": points,
        "seconds": seconds,
        "parameters": run.data.params,
        "files": files,
        "weights": weights,
    }


def killed_after(line, *arguments, world):
    """Start a command and kill it outright once a line that begins so is printed."""
    process = started(*arguments, cwd=world)
    for printed in process.stdout:
        if printed.startswith(line):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def run_of(world):
    (folder,) = (world / "fedloom-runs" / "checkpoints").iterdir()
    return folder.name


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_run_to_the_same_bits(world, undisturbed):
    """Killed twice with SIGKILL, somewhere after a round: no point is missing or stands twice."""
    killed_after("florist: round 2/5", "run", "mine.yaml", *SMALL, world=world)
    run = run_of(world)
    killed_after("florist: round 4/5", "resume", run[:8], "--executor", "local", world=world)

    inside(world, "resume", run[:8], "--executor", "local")

    found = on_record(world)
    assert found["seconds"] == [1, 2, 3, 4, 5]
    assert found == undisturbed


@pytest.mark.slow
def test_a_run_killed_while_it_records_its_end_ends(world, undisturbed):
    killed_after("florist: round 5/5", "run", "mine.yaml", *SMALL, world=world)
    done = inside(world, "resume", run_of(world), "--executor", "local")
    assert "round" not in done.stdout  # nothing is trained again
    assert on_record(world) == undisturbed


def test_a_finished_run_ends_once_more_as_it_was(whole, undisturbed):
    inside(whole, "resume", run_of(whole), "--executor", "local")
    assert on_record(whole) == undisturbed


@pytest.mark.slow
def test_an_interrupted_run_is_told_how_it_goes_on(world):
    process = started("run", "mine.yaml", *SMALL, "--set", "rounds=1000", cwd=world)
    for line in process.stdout:
        if line.startswith("florist: round 2/"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: fedloom resume {run_of(world)[:8]}" in errors


def test_changes_are_refused_by_name_and_can_be_forced(world):
    inside(world, "run", "mine.yaml", *SMALL, "--set", "rounds=1")
    run = run_of(world)
    changes = ("--set", "rounds=2", "--set", "training.learning_rate=0.5", "--executor", "local")

    refused = inside(world, "resume", run, *changes, exit_code=2)
    assert "these keys would change: rounds, training.learning_rate." in refused.stderr

    (world / "rows.jsonl").write_text((world / "rows.jsonl").read_text().replace("a b", "b a"))
    other_data = inside(world, "resume", run, "--executor", "local", exit_code=2)
    assert "key data.source: the data have the fingerprint" in other_data.stderr

    assert "round 2/2" in inside(world, "resume", run, *changes, "--allow-changes").stdout


def test_runs_are_found_by_how_their_ids_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("abc1", "abd2"):
        folder = tmp_path / "fedloom-runs" / "checkpoints" / run
        folder.mkdir(parents=True)
        values = {"run_id": run, "experiment": {}, "fingerprint": "f", "tracking_uri": None, "versions": {}}
        (folder / "run.json").write_text(json.dumps(values))

    assert find("abc").run_id == "abc1"
    with pytest.raises(CheckpointError, match=r"2 runs begin so.*abc1, abd2"):
        find("ab")
    for run in ("x", ""):
        with pytest.raises(CheckpointError, match="no such run"):
            find(run)
    (folder / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json: is damaged"):
        find("abd2")
