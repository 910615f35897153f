"""Libraries that load data talk on stderr; what matters of it reaches the user as a :class:`DataError`."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars, log lines or warnings of `datasets` within the block; its settings are put back after it."""
    import datasets
    import huggingface_hub

    bars = datasets.are_progress_bars_disabled()
    loggers = [(library, library.get_verbosity()) for library in (datasets.logging, huggingface_hub.logging)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        for library, _ in loggers:
            library.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            for library, verbosity in loggers:
                library.set_verbosity(verbosity)
            if not bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def quiet_partitioners() -> Iterator[None]:
    """No word from `flwr_datasets` either: it draws its own bar, and importing it may build Matplotlib's font cache.

    Neither has a switch, so stderr itself is put aside.
    """
    with contextlib.redirect_stderr(io.StringIO()), quiet_datasets():
        yield
