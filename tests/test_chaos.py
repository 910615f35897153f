"""The quickest of the programs that break runs; ``make chaos`` runs them all."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT_S = 360  # a driver and three nodes: more than other tests


def shown_by(program):
    """Run a program of this folder to its end and return what it prints; it fails unless all is well."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / program)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its cluster as well, if it has not ended by itself
    assert process.returncode == 0, output + errors
    return output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_a_run_survives_the_loss_of_a_node_with_the_same_bits():
    """Killed drivers are in ``test_resume.py``, what happens to actors and to the server in ``test_faults.py``."""
    assert "adapter and metrics equal" in shown_by("lost_node.py")
