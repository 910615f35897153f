"""Jobs before they are sent: the wheel, the paths, the command; and how they are listed. No cluster is asked."""

import json
import re
import shlex
import subprocess
import zipfile

import pytest
import yaml
from commands import make_world
from ray.job_submission import JobDetails
from rich.console import Console
from servers import free_port
from test_layout import room_files
from typer.testing import CliRunner

from fedloom.jobs.job_client import FOLDER, HASH, KIND, NAME, RESUMES, JobError
from fedloom.jobs.job_display import table_of
from fedloom.jobs.job_files import JobFiles
from fedloom.jobs.main import app
from fedloom.jobs.submit import command_of, what_ran
from fedloom.jobs.wheel import write_wheel
from fedloom.platform import run_folder
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.ray_job import TOLD, command_to_resume


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def said_of(*arguments):
    """Return what a command says when it refuses: one line, exit code 2, and nothing on stdout."""
    result = CliRunner().invoke(app, list(arguments), env={"RAY_API_SERVER_ADDRESS": None})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_the_wheel_is_the_running_package_and_asks_for_no_other(tmp_path):
    """Whole, and the same whenever it is made; its name follows from its contents."""
    (tmp_path / "again").mkdir()
    wheel, again = write_wheel(tmp_path), write_wheel(tmp_path / "again")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA")]

    assert room_files() == held
    assert "Requires-Dist" not in metadata
    assert (wheel.name, wheel.read_bytes()) == (again.name, again.read_bytes())
    assert re.fullmatch(r"fedloom-[\d.]+\+[0-9a-f]{12}-py3-none-any.whl", wheel.name)


def test_other_files_make_a_wheel_of_another_name(tmp_path, monkeypatch):
    """Ray takes wheels of one name for the same: changed code of an unchanged version must not be one."""
    package = tmp_path / "fedloom"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("fedloom.__file__", str(package / "__init__.py"))
    before = write_wheel(tmp_path)
    (package / "__init__.py").write_text("changed = True")

    assert before.name != write_wheel(tmp_path).name


def test_what_the_cluster_has_is_sent_as_it_is(here, tmp_path):
    """Hub ids, what is built in, and paths below the folder of the cluster."""
    files = JobFiles(folder=str(here), upload_data=False)
    place, experiment = files.add_experiment("mine.yaml", ["seed=5"])
    files.write(tmp_path)

    assert (str(here / "model"), str(here / "rows.jsonl")) == (experiment.model.name, experiment.data.source)
    assert load_experiment(tmp_path / place) == experiment
    assert experiment.seed == 5
    hub = ["model.name=org/model", "data.source=org/data"]
    _, experiment = JobFiles(folder=None, upload_data=False).add_experiment("mine.yaml", hub)
    assert ("org/model", "org/data") == (experiment.model.name, experiment.data.source)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "model.name"),
        (["model.name=builtin:tiny"], "data.source"),
        (["model.name=builtin:tiny", "data.source=/elsewhere/rows"], "data.source"),
        (["model.name=org/model", "data.source=org/data", "population.availability_trace=t"], "availability_trace"),
    ],
)
def test_a_path_of_this_machine_is_refused_before_anything_is_sent(here, overrides, key):
    sets = [word for override in overrides for word in ("--set", override)]
    said = said_of("submit", "mine.yaml", "--address", "http://127.0.0.1:1", "--folder", "/shared/fedloom", *sets)

    assert f"{key}: " in said
    assert "/shared/fedloom, the folder that all machines of the cluster share" in said


def test_data_is_sent_under_a_name_that_follows_from_it(here, tmp_path):
    """The experiment names it relative to the folder in which the job runs, and so does every later one."""
    builtin = ["model.name=builtin:tiny"]
    files, again = (JobFiles(folder=None, upload_data=True) for _ in range(2))
    _, experiment = files.add_experiment("mine.yaml", builtin)
    files.write(tmp_path)

    assert (here / "rows.jsonl").read_bytes() == (tmp_path / experiment.data.source).read_bytes()
    assert experiment == again.add_experiment("mine.yaml", builtin)[1]


def test_a_sweep_takes_its_experiment_along(here, tmp_path):
    """Its paths are looked at wherever they stand: in the experiment, and under the keys of the sweep."""
    sweep = {"name": "s", "experiment": "mine.yaml", "set": {"model": {"name": "builtin:tiny"}}}
    (here / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"space": {"data.source": ["rows.jsonl"]}}))
    from fedloom.tuning.sweep_file import load_sweep

    files = JobFiles(folder=None, upload_data=True)
    with pytest.raises(Exception, match=r"model\.name: 'model' is a path of this machine"):
        files.add_sweep(load_sweep(here / "sweep.yaml"))
    (here / "mine.yaml.2").write_text((here / "mine.yaml").read_text().replace("name: model", "name: org/model"))
    loaded = load_sweep(here / "sweep.yaml").model_copy(update={"experiment": "mine.yaml.2"})
    place, base = files.add_sweep(loaded)
    files.write(tmp_path)
    sent = load_sweep(tmp_path / place)

    assert base.model.name == "builtin:tiny"
    assert (tmp_path / sent.experiment).is_file()
    assert (tmp_path / sent.space["data.source"][0]).is_file()


def test_the_command_runs_in_the_folder_whatever_its_name(tmp_path):
    """Files are put where they stay; a name with spaces or quotes is one name."""
    folder, sent = tmp_path / "it's here; $HOME", tmp_path / "sent"
    (sent / "fedloom-runs").mkdir(parents=True)
    (sent / "fedloom-runs" / "file").touch()
    command = command_of(["run", "a b"], folder=str(folder), has_files=True)
    shown = command.replace("exec python", "printf '%s\\n' \"$PWD\"; exec echo")
    output = subprocess.run(["sh", "-c", shown], cwd=sent, check=True, capture_output=True, text=True).stdout

    assert [str(folder), "-P -m fedloom.jobs.main run a b --address auto"] == output.splitlines()
    assert (folder / "fedloom-runs" / "file").exists()
    assert shlex.join(["run", "a b"]) in command


def test_without_a_folder_the_cluster_says_where(tmp_path):
    command = command_of(["resume", "1"], folder=None, has_files=False).partition(" && exec ")[0] + "; pwd"
    for variables in ({"HOME": str(tmp_path)}, {"HOME": "/", "FEDLOOM_FOLDER": str(tmp_path)}):
        run = ["sh", "-c", command]
        assert f"{tmp_path}\n" == subprocess.run(run, env=variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "demo", "--address", "head:8265"], "write it as http://HOST:PORT"),
        (["submit", "demo", "--address", "http://127.0.0.1:{free}"], "no Ray job server answers there"),
        (["jobs", "--address", "ray://head:10001"], "write it as http://HOST:PORT"),
        (["logs", "raysubmit_1", "--address", "http://127.0.0.1:{free}"], "no Ray job server answers there"),
        (["submit", "dmo"], "no such file and no such preset. Did you mean 'demo'?"),
        (["submit", "demo", "--set", "rouds=3"], "Did you mean 'rounds'?"),
        (["submit", "demo", "--folder", "runs"], "give its absolute path there"),
        (["submit", "florist-tau", "--set", "rounds=3"], "a sweep has its keys in its file"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(arguments, message):
    assert message in said_of(*(word.format(free=free_port()) for word in arguments))


def test_a_password_is_not_sent(monkeypatch):
    """Neither in the tracking URI of a job, nor in the address of its server; and neither is repeated."""
    for arguments in (
        ["--tracking-uri", "http://me:S3cret@tracker"],
        ["--tracking-uri", "postgresql://host/db?password=S3cret"],
        ["--address", "http://me:S3cret@head:8265"],
    ):
        said = said_of("submit", "demo", *arguments)
        assert "a user" in said
        assert "S3cret" not in said


def test_a_table_of_jobs_names_what_fedloom_knows_and_shows_others_too():
    ours = {KIND: "sweep", NAME: "[red]knobs", HASH: "1f0c9a3b5d7e"}
    common = {"type": "SUBMISSION", "entrypoint": "sleep 1 --password S3cret", "start_time": 1_700_000_000_000}
    jobs = [
        JobDetails(submission_id="raysubmit_1f0c9a3b5d7e1234", status="RUNNING", metadata=ours, **common),
        JobDetails(submission_id="another", status="FAILED", **common),
    ]
    console = Console(width=100, record=True)
    console.print(table_of(jobs))
    text = console.export_text()

    assert re.search(r"raysubmit_1f0c9a3b5d7e1234 +running +sweep \[red\]knobs +1f0c9a3b5d7e", text)
    assert re.search(r"another +failed", text)
    assert "S3cret" not in text


def ended(job="raysubmit_1", status="STOPPED", **facts):
    return JobDetails(type="SUBMISSION", submission_id=job, entrypoint="", status=status, metadata=facts)


@pytest.mark.parametrize(
    ("facts", "meant"),
    [
        ({KIND: "run", NAME: "demo", FOLDER: "/shared"}, ("raysubmit_1", False, "/shared")),
        ({KIND: "resumed run", NAME: "demo", RESUMES: "1f0c9a3b"}, ("1f0c9a3b", False, None)),
        ({KIND: "sweep", NAME: "knobs", FOLDER: "/shared"}, ("knobs", True, "/shared")),
        ({KIND: "resumed sweep", NAME: "knobs", RESUMES: "knobs"}, ("knobs", True, None)),
    ],
)
def test_a_job_stands_for_what_it_ran_and_where(facts, meant):
    assert meant == what_ran(ended(**facts))


def test_a_job_that_runs_or_is_not_ours_cannot_be_resumed():
    with pytest.raises(JobError, match=r"raysubmit_1: .* is running; `fedloom stop raysubmit_1` ends it"):
        what_ran(ended(status="RUNNING", **{KIND: "run", NAME: "demo"}))
    with pytest.raises(JobError, match=r"raysubmit_1: .* not sent by `fedloom submit`; give the id of its run"):
        what_ran(ended())


def test_a_run_knows_the_jobs_that_have_played_it(tmp_path, monkeypatch):
    """Also after its cluster is gone; and it tells each of them how it goes on, from wherever its user is."""
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(make_world(tmp_path) / "mine.yaml")
    told = {"metadata": {"job_submission_id": "raysubmit_1"}}
    for run, jobs in (("aa", []), ("bb", ["raysubmit_1", "raysubmit_2", "raysubmit_2"])):
        run_folder.folder_of(run).mkdir(parents=True)
        run_folder.describe(run, experiment, fingerprint="f", tracking_uri="sqlite:///a.db")
        for told["metadata"]["job_submission_id"] in jobs:
            monkeypatch.setenv(TOLD, json.dumps(told))
            run_folder.note_job(run)

    assert ["bb", "bb"] == [run_folder.find(job).run_id for job in ("raysubmit_1", "raysubmit_2")]
    assert len((run_folder.folder_of("bb") / run_folder.JOBS).read_text().split()) == 2
    with pytest.raises(run_folder.CheckpointError, match=r"'raysubmit_3': no such run\. .* there are: aa, bb"):
        run_folder.find("raysubmit_3")
    assert f"fedloom submit --resume bb --folder {tmp_path}" == command_to_resume("bb")
    assert f"fedloom submit --resume-sweep s --folder {tmp_path}" == command_to_resume("s", sweep=True)
    monkeypatch.delenv(TOLD)
    run_folder.note_job("aa")
    assert not (run_folder.folder_of("aa") / run_folder.JOBS).exists()
    assert ("fedloom resume bb", "fedloom sweep --resume s") == (
        command_to_resume("bb"),
        command_to_resume("s", sweep=True),
    )
