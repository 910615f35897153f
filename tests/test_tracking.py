"""Runs on record: what is written, how a run ends, and that nobody else notices."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from runs_on_record import adapter_with, artifacts, base_in, default_store, local
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedloom.platform.errors import AdapterError
from fedloom.platform.experiment import Experiment
from fedloom.platform.peft_format import BaseModel, load_adapter
from fedloom.platform.tracking import (
    Tracking,
    TrackingError,
)
from fedloom.platform.tracking_store import sqlite_file

# MLflow still uses a loader of SQLAlchemy that SQLAlchemy no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")
ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 120.0
EXPERIMENT = Experiment.model_validate(
    {
        "name": "demo",
        "seed": 7,
        "method": {"name": "florist", "tau": 0.9},
        "population": {"profiles": [{"name": "phone", "share": 3, "rank": 2}, {"name": "server", "share": 1}]},
    }
)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """Return a new default store: the only one of this file whose tables are migrated in this process."""
    return default_store(tmp_path_factory.mktemp("work") / "a place, 100%20 mine?")  # names as users have them


@pytest.fixture
def client(tracking: Tracking) -> MlflowClient:
    """Return a reader of our own, so that what is checked is what lies in the store."""
    return MlflowClient(tracking_uri=tracking.uri)


def child(code: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a Python process that talks through its pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_records_the_whole_experiment(tracking: Tracking, client: MlflowClient):
    """Parameters are the resolved experiment, key by key; the file alone reproduces it."""
    with tracking.run(EXPERIMENT, tags={"purpose": "test"}) as run:
        pass
    stored = client.get_run(run.run_id)
    parameters = stored.data.params
    assert parameters["experiment.hash"] == EXPERIMENT.hash
    assert parameters["training.learning_rate"] == "0.001"
    assert parameters["method.tau"] == "0.9"
    assert parameters["adapter.targets"] == "null"
    assert parameters["data.train_on_prompt"] == "false"
    assert parameters["data.source"] == "builtin:stdlib"
    assert [profile["name"] for profile in json.loads(parameters["population.profiles"])] == ["phone", "server"]
    assert stored.info.run_name == "demo/florist"
    assert {name: stored.data.tags[name] for name in ("method", "seed", "purpose")} == {
        "method": "florist",
        "seed": "7",
        "purpose": "test",
    }
    text = local(client, run.run_id, "experiment.yaml").read_text()
    assert Experiment.model_validate(yaml.safe_load(text)).hash == EXPERIMENT.hash


def test_a_long_parameter_is_cut_to_what_mlflow_takes(tracking: Tracking, client: MlflowClient):
    """6,000 characters of a value are kept as a parameter and all of them in the file."""
    targets = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(300))
    changed = EXPERIMENT.model_dump(mode="json") | {"adapter": {"targets": targets}}
    with tracking.run(Experiment.model_validate(changed)) as run:
        pass
    value = client.get_run(run.run_id).data.params["adapter.targets"]
    assert len(value) == 6000
    assert value.startswith('["model.layers.0.self_attn.q_proj", ')
    assert value.endswith("...")
    assert targets[-1] in local(client, run.run_id, "experiment.yaml").read_text()


def test_the_run_names_the_commit_of_its_code(tracking: Tracking, client: MlflowClient):
    """In a checkout: the commit, with -dirty if tracked files have changed since."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a checkout")
    with tracking.run(EXPERIMENT) as run:
        pass
    tags = client.get_run(run.run_id).data.tags
    assert tags["code_version"].removesuffix("-dirty") == tags["mlflow.source.git.commit"]
    assert len(tags["mlflow.source.git.commit"]) == len(git.stdout.strip()) == 40
    assert tags["fedloom_version"] == __import__("fedloom").__version__


def test_metrics_keep_their_round(tracking: Tracking, client: MlflowClient):
    """A point per round and name; NaN stays NaN."""
    with tracking.run(EXPERIMENT) as run:
        for step in range(3):
            run.log(step, {"eval/loss": 2.0**-step, "bytes/total": torch.tensor(10 * step)})
        run.log(3, {"eval/loss": math.nan})
    points = client.get_metric_history(run.run_id, "eval/loss")
    assert [(point.step, point.value) for point in points[:3]] == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert points[3].step == 3
    assert math.isnan(points[3].value)
    assert [point.value for point in client.get_metric_history(run.run_id, "bytes/total")] == [0.0, 10.0, 20.0]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_how_a_run_ended_is_recorded_and_passed_on(
    tracking: Tracking, client: MlflowClient, error: type[BaseException], status: str
):
    """A failed run is FAILED, a stopped one KILLED; the caller gets the very exception, and Ctrl-C says so."""
    thrown = error("stop")
    with pytest.raises(error) as caught, tracking.run(EXPERIMENT) as run:
        raise thrown
    assert caught.value is thrown
    notes = ["the MLflow run is marked KILLED"] if error is KeyboardInterrupt else []
    assert getattr(thrown, "__notes__", []) == notes
    info = client.get_run(run.run_id).info
    assert info.status == status
    assert info.end_time >= info.start_time


def test_a_run_that_ends_is_finished(tracking: Tracking, client: MlflowClient):
    with tracking.run(EXPERIMENT) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_run_that_was_stopped_and_goes_on_is_no_longer_called_stopped(tracking: Tracking, client: MlflowClient):
    with tracking.run(EXPERIMENT) as run:
        run.log(0, {"eval/accuracy": 0.1})
    tracking.stopped(run.run_id, "after round 0 of 5")
    assert client.get_run(run.run_id).data.tags["fedloom.stopped"] == "after round 0 of 5"

    for _ in range(2):
        with tracking.resumed(run.run_id):
            pass
        assert "fedloom.stopped" not in client.get_run(run.run_id).data.tags


def test_ctrl_c_kills_the_run_on_record(tracking: Tracking, client: MlflowClient, tmp_path: Path):
    """A process that gets SIGINT amid a round leaves a KILLED run behind, not one that runs for ever."""
    code = (
        "import signal, sys\n"
        "from fedloom.platform.experiment import Experiment\n"
        "from fedloom.platform.tracking import Tracking\n"
        "with Tracking(sys.argv[1]).run(Experiment()) as run:\n"
        "    print(run.run_id, flush=True)\n"
        "    signal.pause()\n"
    )
    process = child(code, tmp_path, tracking.uri)
    run_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=DEADLINE_S)
    assert "KeyboardInterrupt" in complaints
    assert process.returncode == -signal.SIGINT
    assert client.get_run(run_id).info.status == "KILLED"


def test_child_runs_name_their_parent(tracking: Tracking, client: MlflowClient):
    """A sweep is a run and its trials are runs below it, open at the same time."""
    with tracking.run(EXPERIMENT) as sweep, tracking.run(EXPERIMENT, parent_run_id=sweep.run_id) as trial:
        trial.tag("trial", "0")
    tags = client.get_run(trial.run_id).data.tags
    assert tags["mlflow.parentRunId"] == sweep.run_id
    assert tags["trial"] == "0"


def test_tracking_leaves_no_traces_outside_of_its_store(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """MLflow's global state, its loggers, the current folder and the terminal are as before."""
    monkeypatch.chdir(tmp_path)
    levels = [logging.getLogger(name).level for name in ("mlflow", "alembic")]
    with tracking.run(EXPERIMENT) as run:
        run.log(0, {"eval/accuracy": 0.5})
        run.text("notes/a.txt", "text")
        run.files("plots", {"a.png": b"a"})
        assert mlflow.active_run() is None
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"  # MLflow's own default
    assert levels == [logging.getLogger(name).level for name in ("mlflow", "alembic")]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_artifacts_lie_beside_the_database(tracking: Tracking, client: MlflowClient):
    with tracking.run(EXPERIMENT) as run:
        run.text("reports/clients.csv", "id,examples\n")
    folder = sqlite_file(tracking.uri).parent / "artifacts"
    path = local(client, run.run_id, "reports/clients.csv")
    assert path.is_relative_to(folder)
    assert path.read_text() == "id,examples\n"


def test_files_are_recorded_unchanged(tracking: Tracking, client: MlflowClient):
    with tracking.run(EXPERIMENT) as run:
        run.files("", {"ledger.parquet": b"\x00\x01"})
        run.files("plots", {"a.png": b"a", "b.png": b"b"})
    assert local(client, run.run_id, "ledger.parquet").read_bytes() == b"\x00\x01"
    assert set(artifacts(client, run.run_id, "plots")) == {"plots/a.png", "plots/b.png"}
    assert local(client, run.run_id, "plots/b.png").read_bytes() == b"b"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return base_in(tmp_path / "base")


def test_an_adapter_is_recorded_as_a_folder_that_peft_loads(
    tracking: Tracking, client: MlflowClient, base: BaseModel, tmp_path: Path
):
    """What users download is, through PEFT, the adapter that was given."""
    from peft import PeftModel

    adapter = adapter_with(3)
    with tracking.run(EXPERIMENT) as run:
        run.adapter("final", adapter, base)
    folder = Path(client.download_artifacts(run.run_id, "adapters/final", str(tmp_path)))
    assert {name.rpartition("/")[2] for name in artifacts(client, run.run_id, "adapters/final")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(load_adapter(folder).head["score.weight"], adapter.head["score.weight"])
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base.path))
    layer = PeftModel.from_pretrained(model, str(folder)).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    )
    pair = adapter.factors["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.lora_A["default"].weight, pair.A)
    assert torch.equal(layer.lora_B["default"].weight, pair.B)
    assert layer.scaling["default"] == 2.0


def test_an_adapter_that_peft_would_not_load_is_not_recorded(tracking: Tracking, client: MlflowClient, base: BaseModel):
    """A head of four classes does not fit a model of three; the run fails and has no adapter."""
    with pytest.raises(AdapterError, match="size mismatch"), tracking.run(EXPERIMENT) as run:
        run.adapter("final", adapter_with(4), base)
    assert artifacts(client, run.run_id) == ["experiment.yaml"]
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_a_finished_run_is_added_to_and_stays_as_it_ended(tracking, client, tmp_path):
    with pytest.raises(KeyboardInterrupt), tracking.run(EXPERIMENT) as run:
        raise KeyboardInterrupt
    again = tracking.finished(run.run_id)
    with pytest.raises(TrackingError, match="'adapters/final' is not recorded; has it reached its last round"):
        again.fetched("adapters/final", tmp_path)
    again.files("adapters/final", {"adapter_config.json": b"{}"})
    again.log(10, {"lm_eval/arc/acc": 0.5})

    assert (again.fetched("adapters/final", tmp_path) / "adapter_config.json").read_bytes() == b"{}"
    found = client.get_run(run.run_id)
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"lm_eval/arc/acc": 0.5}
