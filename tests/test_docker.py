"""What docker/ says, held against the programs that it starts; nothing here needs a container engine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from compose_spec import PyCompose
from mlflow.cli import cli as mlflow_cli

from fedloom.jobs.main import app
from fedloom.jobs.presets import experiment_path
from fedloom.jobs.submit import HERE
from fedloom.platform.experiment_file import load_experiment

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CLUSTER, CLAIM = yaml.safe_load_all((DOCKER / "kuberay" / "raycluster.yaml").read_text())
JOB = yaml.safe_load((DOCKER / "kuberay" / "rayjob.yaml").read_text())
GROUPS = CLUSTER["spec"]["workerGroupSpecs"]
PODS = [CLUSTER["spec"]["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in GROUPS)]
FEDLOOM = typer.main.get_command(app)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's command line brings Ray Serve, which pydantic no longer likes
    from ray.scripts.scripts import start as ray_start


def started(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Return the command that the entry point becomes: each program is replaced by one that prints its arguments."""
    for name in ("fedloom", "ray", "mlflow"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), "/usr/bin", "/bin"])
    command = [str(DOCKER / "entrypoint.sh"), *arguments]
    done = subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def service(name: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and variables of a service of the compose file, with every secret filled in."""
    text = {
        key: re.sub(r"\$\{\w+:\?[^}]*\}", "secret", value)
        for key, value in COMPOSE["services"][name]["environment"].items()
    }
    return COMPOSE["services"][name]["command"], text


def check_run(command: list[str]) -> None:
    """The command line takes these arguments, and the experiment with its overrides is valid."""
    assert command[:2] == ["fedloom", "run"]
    parsed = FEDLOOM.commands["run"].make_context("run", command[2:]).params
    load_experiment(experiment_path(parsed["experiment"]), parsed["overrides"] or [])
    assert parsed["address"] == "auto"


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_pinned_small_by_default_and_not_roots():
    assert re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.MULTILINE) == ["python:3.11.14-slim-bookworm"]
    assert "ARG TORCH_BACKEND=cpu\n" in DOCKERFILE
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, flags=re.MULTILINE)
    assert int(user) == 1000
    assert f"useradd --create-home --uid {user} " in DOCKERFILE
    for script in re.findall(r'\["/opt/fedloom/(\S+)"\]', DOCKERFILE):
        assert os.access(DOCKER / script, os.X_OK)
    assert len(re.findall(r"^(?:HEALTHCHECK|ENTRYPOINT) ", DOCKERFILE, flags=re.MULTILINE)) == 2


def test_the_entry_point_starts_what_its_role_says(tmp_path: Path):
    """Without a role it is the command line; Ray and MLflow know every option that it gives them."""
    assert started(tmp_path, "run", "demo") == ["fedloom", "run", "demo"]
    head = started(tmp_path, *service("head")[0], **service("head")[1])
    assert head[:2] == ["ray", "start"]
    assert ray_start.make_context("start", head[2:]).params["head"]
    worker = started(tmp_path, *service("worker")[0], **service("worker")[1])
    assert ray_start.make_context("start", worker[2:]).params["address"] == "head:6379"
    arguments, variables = service("mlflow")
    mlflow = started(tmp_path, *arguments, **variables)
    assert mlflow[:2] == ["mlflow", "server"]
    server = mlflow_cli.commands["server"]
    assert server.make_context("server", mlflow[2:]).params["host"] == "0.0.0.0"
    known = {name for parameter in server.params for name in [parameter.envvar] if isinstance(name, str)}
    assert {name for name in variables if name.startswith("MLFLOW_")} <= known
    assert not any("secret" in argument for argument in mlflow)


def test_an_unknown_role_and_a_missing_database_are_refused(tmp_path: Path):
    for variables, said in (
        ({"FEDLOOM_ROLE": "haed"}, "none of head, worker, mlflow"),
        ({"FEDLOOM_ROLE": "mlflow"}, "give the database"),
    ):
        done = subprocess.run(
            [str(DOCKER / "entrypoint.sh")], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert said in done.stderr


def test_the_compose_file_holds_together():
    """What is depended on exists and can be healthy, volumes are declared, and nothing listens beyond this machine."""
    services = COMPOSE["services"]
    assert set(services) == {"head", "worker", "postgres", "mlflow", "submit"}
    assert services["worker"]["scale"] == 2
    for name, entry in services.items():
        for other, how in entry.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "build" in services[other] or "healthcheck" in services[other], (name, other)
        for volume in entry.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]
        for port in entry.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert entry["image"] == "fedloom" or re.fullmatch(r"\S+:\d+\.\d+-\w+", entry["image"])
        assert entry.get("build", {"dockerfile": "docker/Dockerfile"})["dockerfile"] == "docker/Dockerfile"
    secrets = re.findall(r"(?:TOKEN|PASSWORD): (.*)", (DOCKER / "compose.yaml").read_text())
    assert secrets
    assert all(secret.startswith("${") and ":?" in secret for secret in secrets)  # there is no default to forget


def test_the_names_in_the_compose_file_agree():
    """Who records, records where the server of that name lets it in."""
    services = COMPOSE["services"]
    assert services["head"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "mlflow:*" in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "@postgres/fedloom" in services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    files = services["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
    assert f"install --directory --owner fedloom /home/fedloom/work {files}" in DOCKERFILE


def test_jobs_keep_their_runs_where_a_volume_is():
    """The image says so to `fedloom submit`, and head and workers of the compose file share it."""
    (folder,) = re.findall(r"^ENV FEDLOOM_FOLDER=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert f"WORKDIR {folder}\n" in DOCKERFILE
    assert "${FEDLOOM_FOLDER:-" in HERE
    for name in ("head", "worker"):
        assert f"runs:{folder}" in COMPOSE["services"][name]["volumes"]
    assert folder in {mount["mountPath"] for mount in PODS[0]["containers"][0]["volumeMounts"]}


def test_the_compose_file_keeps_to_the_specification():
    """Every key and the form of every value; anchors are resolved by YAML itself."""
    assert set(PyCompose.from_yaml(yaml.safe_dump(COMPOSE)).service_names()) == set(COMPOSE["services"])
    wrong = yaml.safe_dump(COMPOSE).replace("service_healthy", "healthy")
    with pytest.raises(ValueError, match=r"depends_on\.\w+\.condition: unknown variant `healthy`"):
        PyCompose.from_yaml(wrong)


def test_pods_and_claims_keep_to_kubernetes_schemas():
    """Strictly: no field that Kubernetes would pass over in silence."""
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": pod} for pod in PODS]
    for resource in (CLAIM, *pods):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    wrong = pods[0] | {"spec": pods[0]["spec"] | {"container": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="'container' was unexpected"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_compose_file_submits_a_run_that_exists(tmp_path: Path):
    arguments, variables = service("submit")
    command = started(tmp_path, *arguments, **variables)
    assert command[:2] == ["fedloom", "submit"]
    with FEDLOOM.commands["submit"].make_context("submit", command[2:]) as context:
        load_experiment(experiment_path(context.params["file"]), context.params["overrides"] or [])
    assert variables["RAY_API_SERVER_ADDRESS"] == "http://head:8265"
    assert COMPOSE["services"]["head"]["ports"] == ["127.0.0.1:8265:8265"]


def test_the_groups_of_workers_are_the_profiles_of_the_run():
    """Each profile of the demo asks for the resource of the group of its name, and such a node holds its actor."""
    command = shlex.split(JOB["spec"]["entrypoint"])
    check_run(command)
    overrides = FEDLOOM.commands["run"].make_context("run", command[2:]).params["overrides"]
    profiles = load_experiment(experiment_path("demo"), overrides).population.profiles
    assert [profile.name for profile in profiles] == [group["groupName"] for group in GROUPS]
    for profile, group in zip(profiles, GROUPS, strict=True):
        (resources,) = [json.loads(json.loads(f'"{value[1:-1]}"')) for value in group["rayStartParams"].values()]
        assert resources == profile.resources == {profile.name: 1}
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert profile.num_cpus <= int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])


def test_the_manifests_hold_together():
    """The job names the cluster, pods are the image's user, volumes are claimed, Ray's version is the tested one."""
    assert CLUSTER["apiVersion"] == JOB["apiVersion"] == "ray.io/v1"
    assert (CLUSTER["kind"], JOB["kind"], CLAIM["kind"]) == ("RayCluster", "RayJob", "PersistentVolumeClaim")
    assert JOB["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert f"ray=={CLUSTER['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    options = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
    for group in (CLUSTER["spec"]["headGroupSpec"], *GROUPS):
        assert set(group["rayStartParams"]) <= options
    for pod in PODS:
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert container["image"] == "fedloom"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
        for volume in pod.get("volumes", []):
            assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
