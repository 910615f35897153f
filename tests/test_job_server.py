"""Jobs of a real Ray head, over HTTP and with a token: sent, followed, listed, and kept from those without one."""

import json
import re
import shutil
import urllib.request
from dataclasses import dataclass

import pytest
from commands import fedloom, make_world, started
from heads import TOKEN, started_head

# Head, dashboard, job, driver and actors are some twenty processes: on a machine that others use they take their time.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
# What the cluster and the one who submits know and nobody else should.
SECRETS = {
    "HF_TOKEN": "hf_canary_of_the_hub_0123456789",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-tracker-0123456789",
}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A job that has ended, and what was said of it and to others."""

    job: str
    hint: str
    followed: str
    code: int
    listed: str
    raw: str
    refusals: list[str]
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> Sent:
    """Submit an experiment of one round to a head that knows where runs lie, and follow it to its end."""
    world, cluster = make_world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("cluster")
    shutil.move(world / "model", cluster / "model")
    with started_head(num_cpus=1, dashboard=True, FEDLOOM_FOLDER=str(cluster), **SECRETS) as head:
        known = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": TOKEN, "RAY_API_SERVER_ADDRESS": head.jobs, **SECRETS}
        overrides = ("--set", "rounds=1", "--set", f"model.name={cluster}/model")
        where = ("--folder", cluster, "--upload-data")
        submitted = fedloom("submit", "mine.yaml", *overrides, *where, cwd=world, **known)
        job = submitted.stdout.strip()
        assert submitted.returncode == 0, submitted.stderr
        strangers = [
            started("jobs", cwd=world, **known | {"RAY_AUTH_TOKEN": "another"}),
            started("jobs", cwd=world, **known | {"RAY_AUTH_TOKEN": "", "HOME": str(world)}),
            started("status", f"{job}x", cwd=world, **known),
        ]
        follower = started("logs", job, "--follow", cwd=world, **known)
        refusals = [process.communicate(timeout=500)[1] for process in strangers]
        followed, errors = follower.communicate(timeout=500)
        assert errors == ""
        listed = fedloom("jobs", cwd=world, **known).stdout
        request = urllib.request.Request(f"{head.jobs}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            raw = answer.read().decode()
        files = [path for root in (cluster, head.session) for path in root.rglob("*") if path.is_file()]
        contents = {str(path): path.read_bytes() for path in files}
    return Sent(
        job=job,
        hint=submitted.stderr,
        followed=followed,
        code=follower.returncode,
        listed=listed,
        raw=raw,
        refusals=refusals,
        contents=contents,
    )


def test_a_job_runs_to_its_end_in_the_folder_of_the_cluster(sent):
    """Its id alone on stdout, its rounds in its logs, its run and its data under fedloom-runs."""
    assert re.fullmatch(r"raysubmit_\w+", sent.job)
    assert sent.hint == ""
    assert "flexlora: round 1/1" in sent.followed
    assert sent.code == 0
    assert any(name.endswith("/fedloom-runs/mlflow.db") for name in sent.contents)
    assert any(re.search(r"/fedloom-runs/submitted/\w+/rows.jsonl$", name) for name in sent.contents)
    assert [f"{sent.job}\n".encode()] == [text for name, text in sent.contents.items() if name.endswith("/jobs.txt")]
    assert re.search(rf"{sent.job} +succeeded +run experiment +[0-9a-f]{{12}}", sent.listed)


def test_a_job_is_the_code_that_was_sent(sent):
    """The wheel of this checkout, whose name says what is in it, and nothing that the machine had installed."""
    (job,) = json.loads(sent.raw)
    (wheel,) = job["runtime_env"]["py_modules"]

    assert re.fullmatch(r"gcs://fedloom-[\d.]+\+[0-9a-f]{12}-py3-none-any\.whl", wheel)
    assert any(f"/{wheel[6:-4]}/fedloom/jobs/main.py" in name.replace("%2B", "+") for name in sent.contents)


def test_who_has_no_token_is_told_so_and_learns_nothing(sent):
    """Another token, none, and a job that does not exist: one line each."""
    another, missing, unknown = sent.refusals

    assert "asks for another token" in another
    assert "there is none here" in missing
    assert f"Did you mean {sent.job!r}?" in unknown
    for said in sent.refusals:
        assert len(said.splitlines()) == 1


def test_a_job_carries_no_secret(sent):
    """Neither its runtime environment, metadata and command, nor its logs, nor any file of the cluster."""
    (job,) = json.loads(sent.raw)
    names = {name.rpartition("/")[2] for name in sent.contents}
    secrets = {**SECRETS, "RAY_AUTH_TOKEN": TOKEN}
    found = [
        (name, place)
        for name, secret in secrets.items()
        for place, text in sent.contents.items()
        if secret.encode() in text
    ]

    assert {"RAY_JOB_STOP_WAIT_TIME_S"} == set(job["runtime_env"]["env_vars"])
    assert {"mlflow.db", "run.json", "experiment.yaml", "dashboard_JobHead.log", f"job-driver-{sent.job}.log"} <= names
    assert not [secret for secret in secrets.values() if secret in sent.raw + sent.followed + sent.listed]
    assert not found
