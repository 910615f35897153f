"""Where runs are recorded: a tracking server, a database, or a SQLite file that is made here."""

import http.client
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from fedloom.platform.tracking_calls import TrackingError, mlflow_calls, shown_uri

DEFAULT_FOLDER = "fedloom-runs"
SQLITE = "sqlite:///"
LOCK_TIMEOUT_S = 120.0
REACH_TIMEOUT_S = 10.0
POSTGRESQL_LOCK = 0x6665646C6F6F6D  # "fedloom": the key under which processes wait for each other
KNOWN_PASSWORD = "password1234"


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
    """Make MLflow's tables in a SQLite file or a PostgreSQL database, unless they are there; others make their own.

    MLflow runs its migrations in every process that finds no tables, and they fail when two do so at once. Here one
    process at a time looks and migrates, under a lock. A SQLite file is renamed into place once it has them: it is
    there as a whole or not at all.

    Raises:
        TrackingError: the file or the tables cannot be made, the file is no SQLite file, or a driver is missing.
    """
    database = sqlite_file(uri)
    with mlflow_calls(uri):
        if database is None:
            if uri.startswith("postgresql"):
                _make_tables(uri)
            return
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
    artifacts = artifacts_of(uri)
    destination = [] if artifacts is None else ["--artifacts-destination", artifacts]
    where = [*destination, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *where], {"MLFLOW_BACKEND_STORE_URI": uri}


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; ``None`` for every other store."""
    path = urllib.parse.unquote(uri.removeprefix(SQLITE).partition("?")[0])
    return Path(path) if uri.startswith(SQLITE) and path not in {"", ":memory:"} else None


def sqlite_uri(database: Path) -> str:
    """Return the URI of a SQLite file; only what means something else in a URI is escaped."""
    return SQLITE + str(database).replace("%", "%25").replace("?", "%3F")


def artifacts_of(uri: str) -> str | None:
    """Return the URI of the folder for the files of new runs; ``None`` where a server decides.

    It lies beside a SQLite file, and in ``fedloom-runs`` under the current folder for any other database.
    """
    database = sqlite_file(uri)
    if database is not None:
        return (database.parent / "artifacts").as_uri()
    if uri.startswith("postgresql"):
        return Path(DEFAULT_FOLDER, "artifacts").absolute().as_uri()
    return None


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
        store = SqlAlchemyStore(sqlite_uri(beside), artifacts_of(sqlite_uri(database)))
        store.engine.dispose()
        beside.rename(database)


def _make_tables(uri: str) -> None:
    import sqlalchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:  # the lock goes with the transaction, however it ends
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({POSTGRESQL_LOCK})"))
        SqlAlchemyStore(uri, artifacts_of(uri)).engine.dispose()


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
