"""Signals wait until what must be written is written."""

import contextlib
import signal

import pytest

from fedloom.platform.interrupts import without_interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_status_is_written(number: signal.Signals):
    """A signal inside of the guarded block arrives after it; a second one goes through at once."""
    done = []

    def guarded(times: int) -> None:
        with without_interrupts():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)

    before = signal.signal(number, signal.default_int_handler)  # as the command line does for SIGTERM
    try:
        for times in (0, 1, 2):
            with pytest.raises(KeyboardInterrupt) if times else contextlib.nullcontext():
                guarded(times)
        assert done == [0, 1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
