"""The short form of ``chaos.py``; ``make chaos`` runs the long one, and the other programs of this folder with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEED = "3"  # whose schedule has these three


def shown_by(program, *arguments):
    """Run a program of this folder to its end and return what it prints; it fails unless all is well."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_survives_what_happens_to_it_with_the_same_bits():
    """Four rounds: a lost node, a killed driver and a reply that is late; the other kinds are in ``test_faults.py``."""
    shown = shown_by("chaos.py", "--rounds", "4", "--seed", SEED)
    for kind in ("node lost", "driver killed", "reply delayed"):
        assert f"| {kind} | 1 | 1 |" in shown
    assert "adapter and metrics equal: True" in shown
