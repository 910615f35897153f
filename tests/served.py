"""MLflow's pages for a store, from a server of their own."""

import contextlib
import os
import signal
import subprocess

from servers import answers, free_port, wait_until

from fedloom.platform.tracking import ui_command


@contextlib.contextmanager
def served(uri, folder):
    """Run what ``fedloom ui`` runs until the block ends; yields its address once it answers."""
    port = free_port()
    log = folder / "log"
    with log.open("w") as file:
        command, variables = ui_command(uri, port)
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | variables, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
