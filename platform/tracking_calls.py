"""Calls of MLflow: in silence, and with its errors in one line."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator

from fedloom.platform.errors import FedloomError

# MLflow reads these when it is imported, used or started as a server, here and in child processes: no usage data goes
# to its makers, no links are printed, no workers for jobs are kept. Whoever has set them already keeps the choice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


class TrackingError(FedloomError):
    """The tracking store cannot be reached, opened or written."""


def shown_uri(uri: str) -> str:
    """Return a URI without the user and password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


@contextlib.contextmanager
def mlflow_calls(uri: str) -> Iterator[None]:
    """Keep MLflow's log lines off the terminal, and turn its errors into one line.

    Raises:
        TrackingError: MLflow, its database or the network failed inside.
    """
    import mlflow  # noqa: F401  (its import sets the levels of the loggers)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with _silence:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            if isinstance(error, ImportError) and uri.startswith("postgresql"):
                reason = f"its driver is missing ({reason}); pip install 'fedloom[postgres]' brings psycopg"
            raise TrackingError(f"tracking store {shown_uri(uri)}: {reason}") from error


class _Silence:
    """Loggers that say nothing while any thread is inside."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]
        self._levels: list[int] = []
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._levels = [logger.level for logger in self._loggers]
                for logger in self._loggers:
                    logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for logger, level in zip(self._loggers, self._levels, strict=True):
                    logger.setLevel(level)


_silence = _Silence("mlflow", "alembic")
