"""Processes that try to join a Ray cluster."""

import os
import subprocess
import sys

from commands import ROOT

NO_CHOICE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
# Asks a cluster what ``fedloom`` would ask it first.
JOIN = """
import sys
from fedloom.platform.errors import FedloomError
from fedloom.platform.ray_cluster import cluster_nodes
try:
    print(cluster_nodes(sys.argv[1]))
except FedloomError as error:
    sys.exit(f"error: {error}")
"""


def joining(address: str, **variables: str) -> subprocess.Popen[str]:
    environment = NO_CHOICE | {"PYTHONPATH": str(ROOT)} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", JOIN, address], env=environment, stdout=pipe, stderr=pipe, text=True)


def refused(process: subprocess.Popen[str]) -> str:
    """Return the one line with which a process that joins a cluster ends, after at most one of Ray's log lines."""
    _, errors = process.communicate(timeout=120)
    *logged, said = errors.splitlines()
    assert process.returncode == 1
    assert said.startswith("error: --address")
    assert [line[0] for line in logged] in ([], ["["]), errors
    return said
