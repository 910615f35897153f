"""MLflow's pages for a store, from a server of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request

from fedloom.platform.tracking import ui_command

DEADLINE_S = 120.0


@contextlib.contextmanager
def served(uri, folder):
    """Run what ``fedloom ui`` runs until the block ends; yields its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("w") as file:
        command, variables = ui_command(uri, port)
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | variables, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
                    assert answer.read() == b"OK"
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)  # between two polls, not in place of one
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
