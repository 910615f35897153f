"""A Ray head of one's own, started as docs/security.md says: for this machine alone, and with a token."""

import contextlib
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import ROOT
from servers import free_port
from strangers import NO_CHOICE

TOKEN = secrets.token_hex(16)
BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a head answers, and where it writes."""

    address: str
    jobs: str
    session: Path
    process: subprocess.Popen[str]


@contextlib.contextmanager
def started_head(*, num_cpus: int = 2, dashboard: bool = False, **variables: str) -> Iterator[Head]:
    """Run ``ray start --head`` until the block ends; its PATH begins with this environment."""
    port, jobs, agent, client = (free_port() for _ in range(4))
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    path = {"PATH": f"{BIN}:{NO_CHOICE['PATH']}"}
    ports = f"--dashboard-port {jobs} --dashboard-agent-listen-port {agent} --ray-client-server-port {client}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # Ray's sockets have room for a short path
        command = f"{BIN}/ray start --head --block --port {port} --num-cpus {num_cpus} --temp-dir {folder} "
        command += f"--dashboard-host 127.0.0.1 {ports}" if dashboard else "--include-dashboard false"
        process = subprocess.Popen(
            command.split(),
            env=NO_CHOICE | known | path | variables,
            cwd=ROOT.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert any("Ray runtime started" in line for line in process.stdout), "ray start failed"
            yield Head(
                address=f"127.0.0.1:{port}", jobs=f"http://127.0.0.1:{jobs}", session=Path(folder), process=process
            )
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
