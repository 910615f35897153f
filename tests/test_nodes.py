"""On a cluster of unequal nodes every client runs where its profile says."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What two rounds on three nodes have left: see benchmarks/placement.py."""
    path = tmp_path_factory.mktemp("nodes") / "facts.json"
    command = [sys.executable, "-m", "benchmarks.placement", "--rounds", "2", "--facts", path]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # the actors import the benchmark too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


def test_every_client_runs_on_the_node_that_its_profile_asks_for(facts):
    """Twelve clients, two, one and three sixths of them of a kind, in two rounds."""
    assert facts["placed"] == [["large", "gpu-server", 8], ["medium", "workstation", 4], ["small", "phone", 12]]


def test_ray_grants_what_a_profile_asks_for(facts):
    """Two halves of one declared GPU are one device; who asks for none sees none."""
    granted = Counter((actor["gpus"], json.dumps(actor["resources"], sort_keys=True)) for actor in facts["actors"])

    assert granted == {
        ("0", '{"CPU": 0.5, "GPU": 0.5}'): 2,
        ("", '{"CPU": 1.0, "rtx": 2.0}'): 1,
        ("", '{"CPU": 1.0, "npu": 1.0}'): 1,
    }


def test_the_server_shares_the_fate_of_the_driver_and_of_no_other_node(facts):
    assert facts["server_beside_driver"]
