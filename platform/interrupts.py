"""Ctrl-C and SIGTERM: put off while something is made that must be whole, or turned into one exception."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the exit code after Ctrl-C


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Put off Ctrl-C, and SIGTERM if it is handled, until the block is done; a second signal goes through."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # Python runs handlers in the main thread alone
    waiting = []

    def put_off(number: int, frame: Any) -> None:
        waiting.append(number)
        before = handlers[signal.Signals(number)]
        if len(waiting) > 1 and callable(before):
            before(number, frame)

    for number, before in handlers.items():
        if callable(before):  # else the signal is ignored, or ends the process at once
            signal.signal(number, put_off)
    try:
        yield
    finally:
        for number, before in handlers.items():
            if callable(before):
                signal.signal(number, before)
        if waiting:
            signal.raise_signal(waiting[0])


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do in the block what Ctrl-C does there: Ray Tune has a handler of its own, to save its state."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(ctrl_c):  # a shell lets its background jobs ignore it
            raise KeyboardInterrupt
        ctrl_c(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back after a block in which a library takes it for itself, if it was handled before."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
