"""What tests need of any server: a port that is free, and to wait until it is up."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 120.0


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(address: str) -> bool:
    """Whether a request is answered, and well."""
    try:
        with urllib.request.urlopen(address, timeout=20):
            return True
    except OSError:
        return False


def wait_until(up: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Come back once a server is up. One that has ended, or takes too long, fails the test with what it has logged."""
    deadline = time.monotonic() + DEADLINE_S
    while not up():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)  # between two polls, not in place of one
