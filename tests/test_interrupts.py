"""SIGTERM does what Ctrl-C would; libraries give it back; both wait until what must be written is written."""

import contextlib
import signal

import pytest

from fedloom.platform.interrupts import sigterm_interrupts, sigterm_kept, without_interrupts


@contextlib.contextmanager
def handled(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_is_an_interrupt_even_where_ctrl_c_is_ignored(ctrl_c):
    before = signal.getsignal(signal.SIGTERM)
    with handled(signal.SIGINT, ctrl_c), pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_does_what_a_library_makes_of_ctrl_c():
    """Ray Tune saves its state and goes on to an orderly end."""
    got = []
    with sigterm_interrupts(), handled(signal.SIGINT, lambda number, _: got.append(number)):
        signal.raise_signal(signal.SIGTERM)

    assert got == [signal.SIGINT]


def test_a_library_that_takes_sigterm_gives_it_back_if_it_was_ours():
    for ours in (signal.default_int_handler, signal.SIG_DFL):
        with handled(signal.SIGTERM, ours):
            with sigterm_kept():
                signal.signal(signal.SIGTERM, theirs)
            assert signal.getsignal(signal.SIGTERM) is (ours if callable(ours) else theirs)


def theirs(number, frame):
    raise SystemExit(number)


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
