"""Runs on record: what is written, how a run ends, and that nobody else notices."""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.experiment import Experiment
from fedloom.platform.interrupts import without_interrupts
from fedloom.platform.peft_format import BaseModel, load_adapter
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
    folder = tmp_path_factory.mktemp("work") / "a place, 100%20 mine?" / DEFAULT_FOLDER  # names as users have them
    folder.mkdir(parents=True)
    (folder / ".mlflow.db.new").write_bytes(b"half of a database")  # what a killed process leaves behind
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        return Tracking(None)


@pytest.fixture
def client(tracking: Tracking) -> MlflowClient:
    """Return a reader of our own, so that what is checked is what lies in the store."""
    return MlflowClient(tracking_uri=tracking.uri)


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return [entry.path for entry in client.list_artifacts(run_id, folder)]


def local(client: MlflowClient, run_id: str, path: str) -> Path:
    uri = client.get_run(run_id).info.artifact_uri
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path)) / path


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_status_is_written(number: signal.Signals):
    """A signal inside of the guarded block arrives after it; a second one goes through at once."""
    done = []

    def guarded(times: int) -> None:
        with without_interrupts():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)

    before = signal.signal(number, signal.default_int_handler)  # as the command line does for SIGTERM
    try:
        for times in (0, 1, 2):
            with pytest.raises(KeyboardInterrupt) if times else contextlib.nullcontext():
                guarded(times)
        assert done == [0, 1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


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
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    config.save_pretrained(tmp_path / "base")
    return BaseModel(
        name="random",
        path=str(tmp_path / "base"),
        revision=None,
        task="classification",
        num_labels=3,
        label_names=("a", "b", "c"),
        head_modules=("score",),
    )


def adapter_with(num_labels: int) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(B=torch.randn(8, 2, generator=generator), A=torch.randn(2, 8, generator=generator))
    head = {"score.weight": torch.randn(num_labels, 8, generator=generator)}
    return Adapter(factors={"model.layers.0.self_attn.q_proj": factors}, head=head, scale=2.0)


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
