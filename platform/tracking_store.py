"""Where runs are recorded: a tracking server, or a SQLite file that is made here."""

import contextlib
import http.client
import logging
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fedloom.platform.errors import FedloomError

DEFAULT_FOLDER = "fedloom-runs"
SQLITE = "sqlite:///"
LOCK_TIMEOUT_S = 120.0
REACH_TIMEOUT_S = 10.0
KNOWN_PASSWORD = "password1234"

# MLflow reads these when it is imported, used or started as a server, here and in child processes: no usage data goes
# to its makers, no links are printed, no workers for jobs are kept. Whoever has set them already keeps the choice.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


class TrackingError(FedloomError):
    """The tracking store cannot be reached, opened or written."""


def tracking_uri(given: str | None) -> str:
    """Return where runs are recorded: ``given``, else ``MLFLOW_TRACKING_URI``, else a SQLite file.

    That file is ``fedloom-runs/mlflow.db`` under the current folder. The path of a SQLite URI is made absolute, so that
    it means the same file to every process.

    Raises:
        TrackingError: it is no URI.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{DEFAULT_FOLDER}/mlflow.db"
    database = sqlite_file(uri)
    if database is not None:
        return sqlite_uri(database.absolute()) + "".join(uri.partition("?")[1:])
    if "://" not in uri and uri != "databricks":
        raise TrackingError(
            f"tracking URI {shown_uri(uri)!r} is no URI. Give a server such as http://localhost:5000, "
            f"or a SQLite file: {sqlite_uri(Path(shown_uri(uri)).absolute() / 'mlflow.db')}"
        )
    return uri


def ensure_store(uri: str) -> None:
    """Create the SQLite file of a URI with MLflow's tables, unless it is there; other stores make their own.

    MLflow runs its migrations in every process that finds no tables, and they fail when two do so at once. Here one
    process migrates a new file under a lock and renames it into place: it is there as a whole or not at all.

    Raises:
        TrackingError: the file cannot be created, or is no SQLite file.
    """
    database = sqlite_file(uri)
    if database is None:
        return
    with mlflow_calls(uri):
        if not database.exists():
            _create_store(database)
        with database.open("rb") as file:
            if file.read(16) not in {b"", b"SQLite format 3\x00"}:
                raise TrackingError(f"tracking store {uri}: the file exists and is no SQLite database")


def ui_command(uri: str, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """Return the command that shows a store in MLflow's web pages, on this machine only, and variables for it.

    The store stands in a variable: everybody on the machine can read a command line, and a password in it.

    Raises:
        TrackingError: the store is a server, which has its own pages, or a SQLite file that does not exist.
    """
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"the tracking server {shown_uri(uri)} has its own pages; open it in a browser")
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise TrackingError(f"no runs are recorded in {database}; `fedloom demo` records the first ones")
    artifacts = [] if database is None else ["--artifacts-destination", artifacts_beside(database)]
    where = [*artifacts, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *where], {"MLFLOW_BACKEND_STORE_URI": uri}


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; ``None`` for every other store."""
    path = urllib.parse.unquote(uri.removeprefix(SQLITE).partition("?")[0])
    return Path(path) if uri.startswith(SQLITE) and path not in {"", ":memory:"} else None


def sqlite_uri(database: Path) -> str:
    """Return the URI of a SQLite file; only what means something else in a URI is escaped."""
    return SQLITE + str(database).replace("%", "%25").replace("?", "%3F")


def artifacts_beside(database: Path) -> str:
    """Return the URI of the folder that holds the files of the runs in a SQLite file."""
    return (database.parent / "artifacts").as_uri()


def shown_uri(uri: str) -> str:
    """Return a URI for messages: without user and password, and without the options in which one may stand too."""
    if uri.startswith(SQLITE):
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
    for secret in () if uri.startswith(SQLITE) else (options, user, password, urllib.parse.unquote(password)):
        text = text.replace(secret, "***") if secret else text
    return text


def check_password(uri: str) -> None:
    """Refuse the password that MLflow's server once came with: everybody knows it.

    Raises:
        TrackingError: it is the one that would be sent to the server.
    """
    given = urllib.parse.urlsplit(uri).password if uri.startswith(("http://", "https://")) else None
    if KNOWN_PASSWORD in {given, os.environ.get("MLFLOW_TRACKING_PASSWORD")}:
        raise TrackingError(
            f"tracking store {shown_uri(uri)}: this is the password that MLflow once came with, which everybody knows. "
            "Start the server with MLFLOW_AUTH_ADMIN_PASSWORD, and give it in MLFLOW_TRACKING_PASSWORD. "
            "See docs/security.md."
        )


def _create_store(database: Path) -> None:
    from filelock import FileLock
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=LOCK_TIMEOUT_S):
        if database.exists():
            return
        beside = database.with_name(f".{database.name}.new")
        beside.unlink(missing_ok=True)  # of a process that was killed
        store = SqlAlchemyStore(sqlite_uri(beside), artifacts_beside(database))
        store.engine.dispose()
        beside.rename(database)


def check_reachable(uri: str) -> None:
    """Fail at once for a server that is not there: MLflow itself would try for minutes.

    Raises:
        TrackingError: nobody answers at the address.
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in {"http", "https"}:
        return
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=REACH_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # somebody answers; what they mean by it, MLflow will find out
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # MLflow has its own settings for certificates
            raise TrackingError(f"the tracking server {shown_uri(uri)} does not answer: {reason}") from error


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
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if isinstance(error, MlflowException) and error.get_http_status_code() == http.HTTPStatus.UNAUTHORIZED:
                raise TrackingError(
                    f"tracking store {shown_uri(uri)}: the server asks for a user and password, or for others than "
                    "these. It takes them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
                ) from error
            reason = " ".join(without_secrets(str(error), uri).split())[:400] or type(error).__name__
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
