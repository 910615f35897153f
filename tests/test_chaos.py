"""The short form of ``chaos.py``; ``make chaos`` runs the long one, and the other programs of this folder with it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEED = "3"  # whose schedule has these three
LIMIT_S = 360  # two drivers and three nodes: more than other tests


def shown_by(program, *arguments):
    """Run a program of this folder to its end and return what it prints; it fails unless all is well."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / program), *arguments]
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
def test_a_run_survives_what_happens_to_it_with_the_same_bits():
    """Four rounds: a lost node, a killed driver and a reply that is late; the other kinds are in ``test_faults.py``."""
    shown = shown_by("chaos.py", "--rounds", "4", "--seed", SEED)
    for kind in ("node lost", "driver killed", "reply delayed"):
        assert f"| {kind} | 1 | 1 |" in shown
    assert "adapter and metrics equal: True" in shown
