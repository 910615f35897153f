"""Joining a Ray cluster that asks for a token."""

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from strangers import NO_CHOICE, joining, refused

TOKEN = secrets.token_hex(16)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Start ``ray start --head`` with a token, as docs/security.md says, and return its address."""
    port = free_port()
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    ray = Path(sys.executable).with_name("ray")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # Ray's sockets have room for a short path
        command = f"{ray} start --head --block --port {port} --num-cpus 2 --include-dashboard false --temp-dir {folder}"
        process = subprocess.Popen(
            command.split(), env=NO_CHOICE | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert any("Ray runtime started" in line for line in process.stdout), "ray start failed"
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.ray
def test_who_has_the_token_joins_and_others_are_told_why_not(head, tmp_path):
    """With the token from a file, with none, and with a driver that was told to do without tokens."""
    (tmp_path / "token").write_text(TOKEN)
    let_in = joining(head, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    missing = joining(head, HOME=str(tmp_path))
    disabled = joining(head, RAY_AUTH_MODE="disabled")

    output, errors = let_in.communicate(timeout=120)

    assert "'num_cpus': 2.0" in output, errors
    assert "there is no token for this cluster" in refused(missing)
    assert "asks for another token" in refused(disabled)


def test_an_address_where_nobody_answers_is_one_line():
    address = f"127.0.0.1:{free_port()}"

    assert f"--address {address}: no Ray cluster answers there" in refused(joining(address))
