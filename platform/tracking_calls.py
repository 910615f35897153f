"""Calls of MLflow: in silence, with its errors in one line, and again while the store is away."""

import contextlib
import http
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fedloom.platform.errors import FedloomError

# MLflow reads these when it is imported, used or started as a server, here and in child processes: no usage data goes
# to its makers, no links and no progress bars are printed, no workers for jobs are kept. Whoever has set them already
# keeps the choice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

OUTAGE_LIMIT_S = 600.0
LONGEST_PAUSE_S = 10.0  # between two tries; the first pause is a sixteenth of it, each further one twice as long
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})  # statuses of HTTP after which MLflow itself would try again

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class TrackingError(FedloomError):
    """The tracking store cannot be reached, opened or written."""


class StoreAwayError(TrackingError):
    """The store does not answer, or says that it cannot just now; the same call may succeed later."""


def shown_uri(uri: str) -> str:
    """Return a URI for messages: without user and password, and without the options in which one may stand too."""
    if uri.startswith("sqlite:///"):
        return uri
    plain, question, _ = uri.partition("?")
    scheme = re.match(r"(?:[\w+.-]+://)?", plain)[0]  # type: ignore[index] # it matches the empty text
    _, at, place = plain.removeprefix(scheme).rpartition("@")
    return f"{scheme}{'***@' if at else ''}{place}" + (f"{question}***" if question else "")


def without_secrets(text: str, uri: str) -> str:
    """Return what a library has said of a store, without the user, password and options that its URI holds."""
    plain, _, options = uri.partition("?")
    user = plain.partition("://")[2].rpartition("@")[0]
    password = user.partition(":")[2]
    text = text.replace(uri, shown_uri(uri))
    for secret in () if uri.startswith("sqlite:///") else (options, user, password, urllib.parse.unquote(password)):
        text = text.replace(secret, "***") if secret else text
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientCalls:
    """Calls of MLflow that outlast a store that is away.

    Attributes:
        uri: of the store.
        outage_limit_s: real seconds, from the first call that failed, after which none is made again.
    """

    uri: str
    outage_limit_s: float = OUTAGE_LIMIT_S

    def __call__(self, call: Callable[[], Answer]) -> Answer:
        """Make a call until the store answers.

        What came of a call without an answer is unknown: it must mean the same when it is made twice. The first
        failure and the return are said on the logger.

        Raises:
            TrackingError: the store refused the call, or was away for longer than the limit.
        """
        began_s, pause_s = 0.0, LONGEST_PAUSE_S / 16
        while True:
            try:
                with mlflow_calls(self.uri):
                    answer = call()
            except StoreAwayError as error:
                now_s = time.monotonic()
                if not began_s:
                    began_s = now_s
                    logger.warning("%s; trying again for up to %g s", error, self.outage_limit_s)
                if now_s + pause_s - began_s > self.outage_limit_s:
                    raise TrackingError(f"{error} (tried for {self.outage_limit_s:g} s)") from error
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if began_s:
                    away_s = time.monotonic() - began_s
                    logger.warning("tracking store %s: answers again after %.0f s", shown_uri(self.uri), away_s)
                return answer


@contextlib.contextmanager
def mlflow_calls(uri: str) -> Iterator[None]:
    """Keep MLflow's log lines off the terminal, let it ask once, and turn its errors into one line.

    Raises:
        StoreAwayError: the store is away or, if it is a SQLite file, locked.
        TrackingError: MLflow, its database or the network failed otherwise.
    """
    import mlflow  # noqa: F401  (its import sets the levels of the loggers)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with _quiet:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            if isinstance(error, MlflowException) and error.get_http_status_code() == http.HTTPStatus.UNAUTHORIZED:
                raise TrackingError(
                    f"tracking store {shown_uri(uri)}: the server asks for a user and password, or for others than "
                    "these. It takes them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
                ) from error
            reason = " ".join(without_secrets(str(error), uri).split())[:400] or type(error).__name__
            if isinstance(error, ImportError) and uri.startswith("postgresql"):
                reason = f"its driver is missing ({reason}); pip install 'fedloom[postgres]' brings psycopg"
            kind = StoreAwayError if _is_away(uri, error) else TrackingError
            raise kind(f"tracking store {shown_uri(uri)}: {reason}") from error


def _is_away(uri: str, error: Exception) -> bool:
    """Whether the same call may succeed later, without anything being mended on this machine."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError, RequestException
    from sqlalchemy.exc import OperationalError

    if uri.startswith("sqlite:"):
        return "database is locked" in str(error)
    if isinstance(error, MlflowException):
        return error.get_http_status_code() in TRANSIENT
    if isinstance(error, HTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT
    return isinstance(error, (RequestException, OperationalError, ConnectionError))


class _Quiet:
    """Loggers that say nothing, and HTTP requests that MLflow makes once, while any thread is inside.

    MLflow would repeat them with pauses of up to two minutes and no word. Whoever has set the number keeps it.
    """

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]
        self._levels: list[int] = []
        self._retries: str | None = None
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._retries = os.environ.get(RETRIES)
                os.environ.setdefault(RETRIES, "0")
                self._levels = [logger.level for logger in self._loggers]
                for logger in self._loggers:
                    logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                if self._retries is None:
                    del os.environ[RETRIES]
                for logger, level in zip(self._loggers, self._levels, strict=True):
                    logger.setLevel(level)


_quiet = _Quiet("mlflow", "alembic")
