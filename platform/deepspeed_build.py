"""DeepSpeed's C++ part, compiled once and ahead of time, and what else its clients need of a machine.

DeepSpeed would compile it when a group of processes starts, in every one of them, behind a lock file that a killed
process leaves for ever. Here one process compiles, with a time limit, into a folder of its own that takes its place
only when it is complete; the lock is the operating system's, which ends with its holder.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from fedloom.platform.errors import MachineError

OP = "deepspeed_shm_comm"  # what a group of processes without GPUs loads when it starts
BUILD_LIMIT_S = 600.0
INSTALL = "pip install 'fedloom[deepspeed]'"
_COMPILE = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"


def missing_packages() -> list[str]:
    """Return the packages of the extra ``deepspeed`` that this Python cannot import."""
    return [name for name in ("deepspeed", "ninja") if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """Refuse to go on without DeepSpeed.

    Raises:
        MachineError: with the command that installs it.
    """
    if missing := missing_packages():
        raise MachineError(
            f"trainer 'deepspeed' needs the package {missing[0]!r}, which is not installed here: {INSTALL}. "
            "Or choose trainer: plain."
        )


def compiler() -> str | None:
    """Return the path of the C++ compiler that would be used, if there is one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """Return where the compiled part lies: a folder for each version of DeepSpeed, PyTorch and Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = f"{importlib.metadata.version('deepspeed')}-torch-{importlib.metadata.version('torch')}"
    folder = f"deepspeed-{versions}-{sysconfig.get_config_var('SOABI')}"
    return cache / "fedloom" / folder / OP / f"{OP}.so"


def ensure_built(*, limit_s: float = BUILD_LIMIT_S) -> Path:
    """Compile DeepSpeed's C++ part unless it is there; returns the library.

    Raises:
        MachineError: DeepSpeed or a compiler is absent, the compiler failed, or ``limit_s`` has passed.
    """
    check_installed()
    if not library().is_file() and compiler() is None:
        raise MachineError(
            f"DeepSpeed's C++ part must be compiled once and there is no {os.environ.get('CXX', 'c++')!r} on the PATH. "
            "Install a C++ compiler (Debian: apt-get install g++), or name one in CXX; then `fedloom doctor`."
        )
    return built(library(), [sys.executable, "-c", _COMPILE], limit_s=limit_s)


def built(target: Path, command: Sequence[str], *, limit_s: float) -> Path:
    """Run a command that builds ``target``'s folder below ``TORCH_EXTENSIONS_DIR``, unless the target is there.

    One process of a machine builds, others wait for it. Whatever kills the command, nothing of it is taken for a
    result, and nothing that it leaves makes a later call wait.

    Raises:
        MachineError: the command failed, or it or the wait took longer than ``limit_s``.
    """
    if target.is_file():
        return target
    root = target.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=limit_s):
            if not target.is_file():
                for left in root.glob("building-*"):
                    shutil.rmtree(left, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix="building-", dir=root) as folder:
                    _compile(command, Path(folder), limit_s)
                    shutil.rmtree(target.parent, ignore_errors=True)
                    os.replace(Path(folder) / target.parent.name, target.parent)
    except Timeout as error:
        raise MachineError(f"another process has been compiling in {root} for more than {limit_s:g} s") from error
    return target


def _compile(command: Sequence[str], folder: Path, limit_s: float) -> None:
    # ninja lies beside Python where pip has installed it, which need not be on the PATH.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), *_ninja_folders()])
    chosen = {"TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu", "PATH": search}
    process = subprocess.Popen(
        command,
        env=os.environ | chosen | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the compiler's own children can be killed with it
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise MachineError(
            f"compiling DeepSpeed's C++ part took more than {limit_s:g} s and was stopped; "
            "`fedloom doctor` tries again, best on a machine that does less beside"
        ) from error
    if process.returncode:
        reason = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing was said")
        raise MachineError(f"DeepSpeed's C++ part cannot be compiled (`fedloom doctor` tries again): {reason[:300]}")


def _ninja_folders() -> list[str]:
    if importlib.util.find_spec("ninja") is None:
        return []
    import ninja

    return [str(ninja.BIN_DIR)]
