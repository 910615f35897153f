"""SIGTERM does what Ctrl-C would, and whoever handled it before handles it afterwards."""

import contextlib
import signal

import pytest

from fedloom.platform.interrupts import sigterm_interrupts, sigterm_kept


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
