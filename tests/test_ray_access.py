"""Who gets into a Ray cluster: what an embedded one listens on, and joining one that asks for a token."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOKEN = secrets.token_hex(16)
NO_CHOICE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}

# Prints which addresses this process and its children listen on, and how a stranger with another token fares.
EMBEDDED = """
import json, os, subprocess, sys
import psutil, ray
from fedloom.platform.ray_cluster import start_ray
start_ray(None)
ray.get(ray.remote(lambda: 1).remote())
me = psutil.Process()
found = [(c.laddr.ip, p.name()) for p in (me, *me.children(recursive=True))
         for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
stranger = subprocess.run(
    [sys.executable, "-c", "import sys; from fedloom.platform.ray_cluster import start_ray; start_ray(sys.argv[1])",
     ray.get_runtime_context().gcs_address],
    env=os.environ | {"RAY_AUTH_TOKEN": "another"}, capture_output=True, text=True, timeout=100)
ray.shutdown()
print(json.dumps({"listening": found, "stranger": stranger.stderr}))
"""


def python(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = NO_CHOICE | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.ray
def test_an_embedded_cluster_listens_on_loopback_alone_and_asks_for_its_token(tmp_path):
    """Every TCP port of every one of its processes, by the kernel's own account; no token is left in the home."""
    done = python(EMBEDDED, HOME=str(tmp_path))
    said = json.loads(done.stdout.splitlines()[-1])
    addresses = {ip.removeprefix("::ffff:") for ip, _ in said["listening"]}

    assert {"127.0.0.1"} == addresses
    assert {"gcs_server", "raylet"} <= {name for _, name in said["listening"]}
    assert "asks for another token" in said["stranger"]
    assert not (tmp_path / ".ray").exists()


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[str]:
    """Start ``ray start --head`` with a token, as docs/security.md says, and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("r")
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    ray = Path(sys.executable).with_name("ray")
    command = f"{ray} start --head --block --port {port} --num-cpus 2 --include-dashboard false --temp-dir {folder}"
    process = subprocess.Popen(
        command.split(), env=NO_CHOICE | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = iter(process.stdout)
    assert any("Ray runtime started" in line for line in lines), "ray start failed"
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def joined(address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Ask ``fedloom`` for what it would ask a cluster first: its nodes."""
    program = (
        "import sys; from fedloom.jobs.main import explained_errors\n"
        "with explained_errors():\n"
        "    from fedloom.platform.ray_cluster import cluster_nodes\n"
        "    print(cluster_nodes(sys.argv[1]))\n"
    )
    return python(program, address, **variables)


@pytest.mark.ray
def test_who_has_the_token_joins(head, tmp_path):
    done = joined(head, RAY_AUTH_TOKEN=TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    by_file = joined(head, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))

    assert "'num_cpus': 2.0" in done.stdout, done.stderr
    assert "'num_cpus': 2.0" in by_file.stdout, by_file.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "there is no token for this cluster"),
        ({"RAY_AUTH_TOKEN": "another"}, "asks for another token"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for another token"),
    ],
)
def test_without_the_token_nobody_joins_and_one_line_says_why(head, tmp_path, variables, said):
    done = joined(head, HOME=str(tmp_path), **variables)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]

    assert said in lines[0]
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_an_address_where_nobody_answers_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    done = joined(address)

    assert f"error: --address {address}: no Ray cluster answers there" in done.stderr
    assert "Traceback" not in done.stderr
