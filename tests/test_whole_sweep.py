"""A whole sweep whose trials fail, that is killed and goes on: its trials are ordinary runs whatever happens."""

import contextlib
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from commands import fedloom, make_world, started
from mlflow import MlflowClient
from typer.testing import CliRunner

from fedloom.jobs.main import app

# No update is below such a norm, so that two of the four trials fail, however often they are tried.
SWEEP = {
    "name": "knobs",
    "experiment": "mine.yaml",
    "set": {"rounds": 6},
    "space": {"method.name": ["florist", "fedit"], "method.tau": [0.7], "updates.max_norm": [None, 1e-12]},
    "trials": {"concurrent": 1},  # what many trials at once do to a store is tested in test_tracking_stores.py
    "register_as": "best-of-knobs",
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep that was killed outright in its second round and has gone on: its folder, and what was shown."""
    folder = make_world(tmp_path_factory.mktemp("swept"))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    first = started("sweep", "sweep.yaml", cwd=folder)
    checkpoints = folder / "fedloom-runs" / "checkpoints"
    while first.poll() is None and not list(checkpoints.glob("*/checkpoint-000002")):
        time.sleep(0.05)  # between two looks, not in place of one
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not list(checkpoints.glob("*/checkpoint-000006"))
    again = fedloom("sweep", "--resume", "knobs", cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    return folder, again.stdout


@pytest.fixture(scope="module")
def client(swept):
    return MlflowClient(f"sqlite:///{swept[0]}/fedloom-runs/mlflow.db")


@pytest.fixture(scope="module")
def runs(client):
    """The runs of the sweep: the parent, then its children."""
    found = client.search_runs(["1"])
    (parent,) = [run for run in found if "fedloom.sweep_id" in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == 1 + len(children)
    return parent, children


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(360)  # the fixture starts two clusters, one after the other
def test_a_killed_sweep_goes_on_in_the_same_runs_and_plays_nothing_twice(client, runs):
    parent, children = runs
    assert parent.info.status == "FINISHED"
    assert Counter(run.info.status for run in children) == {"FINISHED": 2, "FAILED": 2}
    assert len({run.data.params["experiment.hash"] for run in children}) == 4
    for run in children:
        assert run.data.tags["method"] == run.data.params["method.name"]
        assert ("method.tau" in run.data.params) == (run.data.tags["method"] == "florist")
        assert (run.info.status == "FAILED") == (run.data.params["updates.max_norm"] == "1e-12")
        rounds = 6 if run.info.status == "FINISHED" else 0
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in history) == list(range(1, rounds + 1))


@pytest.mark.ray
@pytest.mark.slow
def test_a_bad_trial_is_told_and_does_not_end_the_sweep(swept):
    shown = swept[1]
    assert shown.count("finished after round 6/6") == 2
    assert shown.count("failed: round 1: 0 of 3 updates were accepted") == 2
    assert "2 of 4 trials failed" in shown


@pytest.mark.ray
@pytest.mark.slow
def test_the_best_adapter_is_registered_with_its_lineage(client, runs):
    parent, children = runs
    (version,) = client.search_model_versions("name = 'best-of-knobs'")
    best = max(run.data.metrics["eval/accuracy"] for run in children if run.info.status == "FINISHED")
    assert client.get_run(version.run_id).data.metrics["eval/accuracy"] == best
    assert version.tags["fedloom.parent_run"] == parent.info.run_id
    assert Path(version.source.removeprefix("file://"), "adapter_model.safetensors").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_has_the_bits_of_the_same_experiment_alone(swept, client, runs):
    (trial,) = [run for run in runs[1] if run.data.tags["method"] == "florist" and run.info.status == "FINISHED"]
    settings = ("rounds=6", "method.name=florist", "method.tau=0.7")
    words = [word for setting in settings for word in ("--set", setting)]
    with contextlib.chdir(swept[0]):
        alone = CliRunner().invoke(app, ["run", "mine.yaml", "--executor", "local", *words])
    assert alone.exit_code == 0, alone.output
    known = {run.info.run_id for run in (runs[0], *runs[1])}
    (plain,) = [run for run in client.search_runs(["1"]) if run.info.run_id not in known]
    for name in ("train/loss", "eval/loss", "bytes/total"):
        points = [client.get_metric_history(run.info.run_id, name) for run in (trial, plain)]
        assert [point.value for point in points[0]] == [point.value for point in points[1]]
    folders = [client.download_artifacts(run.info.run_id, "adapters/final") for run in (trial, plain)]
    assert len({Path(folder, "adapter_model.safetensors").read_bytes() for folder in folders}) == 1
