"""A PostgreSQL server of one's own, from the system's packages: made in a temporary folder, gone afterwards."""

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from servers import free_port

USER = "fedloom"
MISSING = "no PostgreSQL server (Debian: apt-get install postgresql) or no psycopg is installed"


def programs() -> Path | None:
    """Return the folder of the newest server that is installed."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return found[-1] if found else None


@contextlib.contextmanager
def server() -> Iterator[str | None]:
    """Start a server and give the URI of its empty database, with a password.

    It refuses to run as root, and runs as nobody then. Without a server or a driver there is ``None``.
    """
    where, port, password = programs(), free_port(), secrets.token_hex(16)
    if where is None or importlib.util.find_spec("psycopg") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fedloom-postgres-") as temporary:  # pytest's own folders are root's alone
        folder = Path(temporary)
        (folder / "password").write_text(password)
        account: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for path in (folder, folder / "password"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)

        def call(name: str, *arguments: str) -> None:
            command = [str(where / name), "-D", str(folder / "data"), *arguments]
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, **account
            )
            assert done.returncode == 0, (folder / "log").read_text()

        with (folder / "log").open("w") as log:
            call("initdb", "-U", USER, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
            options = f"-h 127.0.0.1 -p {port} -F -c unix_socket_directories="
            call("pg_ctl", "-w", "-o", options, "start")
            try:
                yield f"postgresql+psycopg://{USER}:{password}@127.0.0.1:{port}/postgres"
            finally:
                call("pg_ctl", "-w", "-m", "immediate", "stop")
