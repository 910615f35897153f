"""Short forms of the programs ``chaos.py``, ``cuts.py`` and ``soak.py``, which show more in more time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


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
    """Seven rounds: every kind of loss once."""
    shown = shown_by("chaos.py", "--rounds", "7")
    for kind in ("actor", "process", "server", "driver"):
        assert f"| {kind} killed | 1 | 1 |" in shown
    assert "| node lost | 1 | 1 |" in shown
    assert "adapter and metrics equal: True" in shown


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_bits():
    assert "4 of 4" in shown_by("cuts.py", "--cuts", "16")


@pytest.mark.ray
@pytest.mark.slow
def test_a_long_run_does_not_grow():
    assert "growth" in shown_by("soak.py", "--rounds", "60", "--settled", "20", "--tolerance", "0.1")
