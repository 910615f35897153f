"""The command line as a user meets it: real processes, one-line errors, nothing heavy before it is needed."""

import os
import subprocess
import sys

import pytest
from commands import ROOT, fedloom, make_world
from typer.testing import CliRunner

from fedloom import __version__
from fedloom.jobs.main import app
from fedloom.platform.experiment_file import load_experiment


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_command_list_is_frozen():
    """Flags and commands only grow; a new one is a decision, made here as well."""
    commands = {command.callback.__name__ for command in app.registered_commands}

    assert commands == {
        *(
            "run",
            "resume",
            "plan",
            "sweep",
            "evaluate",
            "tune_rank",
            "compare",
            "doctor",
            "demo",
            "ui",
            "methods",
            "presets",
        ),
        "aggregate",
        *("submit", "jobs", "status", "logs", "stop"),
    }


def test_version_and_help_name_what_there_is():
    runner = CliRunner()

    assert runner.invoke(app, ["--version"]).output == f"fedloom {__version__}\n"
    assert "Run one experiment to its last round" in runner.invoke(app, ["--help"]).output


def test_help_imports_nothing_heavy(tmp_path):
    """`fedloom --help` must answer at once, so none of the slow libraries may be behind it."""
    script = (
        "import sys; from typer.testing import CliRunner; from fedloom.jobs.main import app;"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0;"
        "print(sorted({'torch','ray','mlflow','transformers','peft','datasets','numpy'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "error: nowhere.yaml: there is no such file and no such preset."),
        (["run", "mine.yaml", "--set", "rouds=3"], "error: mine.yaml, key rouds: unknown key. Did you mean 'rounds'?"),
        (["run", "mine.yaml", "--set", "data.source=rows.jsnl"], "rows.jsnl"),
        (["run", "mine.yaml", "--set", "data.columns.text=txt"], "Did you mean 'text'?"),
        (["run", "mine.yaml", "--set", "cohort.size=9"], "a cohort of 9 is larger than the population of 6 clients"),
        (["run", "mine.yaml", "--set", "population.profiles.0.rank=64"], "larger than module"),
        (["run", "mine.yaml", "--set", "adapter.targets=[q_prj]"], "Did you mean 'q_proj'?"),
        (["run", "mine.yaml", "--set", "model.name=./nothing"], "is no model folder"),
        (["run", "mine.yaml", "--set", "model.name=modell"], "Did you mean 'model'? Give a folder"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_ray_starts(world, monkeypatch, arguments, message):
    """Exit code 2, no traceback, no run on record."""
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "ray", None)  # importing Ray would fail the command

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (world / "fedloom-runs").exists()


def test_a_dry_run_prints_the_resolved_experiment_and_leaves_nothing(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)

    result = CliRunner().invoke(app, ["run", "mine.yaml", "--set", "seed=5", "--dry-run"])
    (tmp_path / "again.yaml").write_text(result.stdout)

    assert result.exit_code == 0, result.stderr
    assert load_experiment(tmp_path / "again.yaml") == load_experiment(world / "mine.yaml", ["seed=5"])
    assert not (world / "fedloom-runs").exists()


def test_a_run_is_on_record_with_its_adapter_and_its_accuracy(world, tmp_path):
    """From the command line to PEFT: the saved adapter, loaded by others' code, has the logged accuracy."""
    import torch
    from mlflow import MlflowClient
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = fedloom(
        *("run", "mine.yaml", "--executor", "local", "--tracking-uri", uri, "--set", "save_every=1"),
        cwd=world,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line[:17] for line in done.stdout.splitlines()] == [f"flexlora: round {n}" for n in range(3)]
    assert "round 2/2" in done.stdout

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.name"] == "flexlora"
    history = client.get_metric_history(run.info.run_id, "eval/accuracy")
    assert [point.step for point in history] == [0, 1, 2]
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id, "adapters")}
    assert artifacts == {"adapters/round-0001", "adapters/final"}
    top = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert top == {"adapters", "clients.csv", "experiment.yaml", "ledger.parquet", "plots"}

    folder = client.download_artifacts(run.info.run_id, "adapters/final", str(tmp_path))
    base = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=2, pad_token_id=1)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    from fedloom.platform.data.prepare import prepare_data

    experiment = load_experiment(world / "mine.yaml", [f"data.source={world / 'rows.jsonl'}"])
    data = prepare_data(experiment, tokenizer)
    right = 0
    for index in data.test:
        tokens = torch.tensor(data.input_ids[data.offsets[index] : data.offsets[index + 1]].tolist())[None]
        with torch.no_grad():
            right += int(model(input_ids=tokens).logits.argmax()) == data.labels[index]
    assert right / len(data.test) == pytest.approx(history[-1].value, abs=1e-9)
