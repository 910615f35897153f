"""On a cluster of unequal nodes every client runs where its profile says, and a node holds the weights once."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
HERE = Path(__file__).parent
NODE_OF = {"large": "gpu-server", "medium": "workstation", "small": "phone"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What one run on three nodes has left: see tests/placement.py."""
    path = tmp_path_factory.mktemp("nodes") / "facts.json"
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run(
        [sys.executable, HERE / "placement.py", "--rounds", "2", "--facts", path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


def test_every_client_runs_on_the_node_that_its_profile_asks_for(facts):
    placed = {(profile, node): count for profile, node, count in facts["placed"]}

    assert {(profile, NODE_OF[profile]): count for profile, count in facts["profiles"].items()} == placed
    assert set(facts["profiles"]) == set(NODE_OF), "every profile had a client in some round"
    assert facts["same"], "the adapter is that of a run in one process"


def test_ray_grants_what_a_profile_asks_for(facts):
    """Two halves of one declared GPU are one device; who asks for none sees none."""
    granted = Counter((a["node"], a["visible"], json.dumps(a["granted"], sort_keys=True)) for a in facts["actors"])

    assert granted == {
        ("gpu-server", "0", '{"CPU": 0.5, "GPU": 0.5}'): 2,
        ("workstation", "", '{"CPU": 1.0, "rtx": 2.0}'): 1,
        ("phone", "", '{"CPU": 1.0, "npu": 1.0}'): 1,
    }


def test_actors_of_a_node_read_the_weights_from_the_same_memory_of_its_object_store(facts):
    """A frozen weight is at the same offset of the same file, which lives in memory; other nodes have their own."""
    first, second, *others = sorted(facts["actors"], key=lambda actor: actor["node"])
    assert first["node"] == second["node"] == "gpu-server"

    assert first["weights"]
    assert first["weights"] == second["weights"]
    assert all("plasma" in name for _, name, _, _ in first["weights"].values())
    for other in others:
        assert other["weights"].keys() == first["weights"].keys()
        assert not {(name, inode) for _, name, inode, _ in other["weights"].values()} & {
            (name, inode) for _, name, inode, _ in first["weights"].values()
        }
