"""What the fuzz tests share: how much they try, and how much memory a reader may take.

``FUZZ=100 pytest tests/test_fuzz_*.py`` tries a hundred times as many inputs, and other ones each time.
"""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from fedloom.platform.errors import FedloomError

REPOSITORY = Path(__file__).resolve().parents[1]
FACTOR = int(os.environ.get("FUZZ", "1"))
LONGEST_MESSAGE = 20_000
# An expression for the most bytes that a process has ever had in memory.
HIGH_WATER = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024"


def tries(number: int) -> settings:
    """Return the settings of a fuzz test: ``number`` inputs, the same ones in every run unless FUZZ asks for more."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


def outcome(read: Callable[[], Any]) -> Any:
    """Return what a reader gives, or its error if it is one of ours and can be printed; all else is raised."""
    try:
        return read()
    except FedloomError as error:
        message = str(error)
        assert message.strip(), "an error without a message"
        assert len(message) <= LONGEST_MESSAGE
        assert "Traceback" not in message
        message.encode()
        return error


def refused(read: Callable[[], Any]) -> str:
    """Return the message with which a reader refuses."""
    error = outcome(read)
    assert isinstance(error, FedloomError), f"it was read: {error!r}"
    return str(error)


def peak_bytes(read: Callable[[], Any]) -> int:
    """Return the most memory that Python held while a reader read, or refused."""
    tracemalloc.start()
    try:
        outcome(read)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_resident_bytes(warm: str, script: str) -> int:
    """Return by how much a process of its own grew over ``script``, after ``warm`` had run: libraries' own memory too.

    The high-water mark is the kernel's for the address space, so that memory given back in between counts.
    """
    program = f"{warm}\nbefore = {HIGH_WATER}\n{script}\nprint({HIGH_WATER} - before)\n"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])
