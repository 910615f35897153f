"""Runs on record: parameters, metrics per round, adapters and plots, in MLflow.

Everything goes through ``MlflowClient``, so that MLflow's global state (active run, tracking URI) is left to the user's
own code. Without a server, runs lie in one SQLite file and a folder of artifacts beside it.
"""

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import fedloom
from fedloom.platform.errors import FedloomError
from fedloom.platform.experiment import Experiment
from fedloom.platform.plots import curves

if TYPE_CHECKING:  # they import torch, which `fedloom ui` and other readers of the store do without
    from fedloom.platform.adapter import Adapter
    from fedloom.platform.peft_format import BaseModel

DEFAULT_FOLDER = "fedloom-runs"
SQLITE = "sqlite:///"
MAX_PARAMETER_CHARACTERS = 6000  # MLflow's own limit
PARAMETERS_PER_CALL = 100  # likewise
LOCK_TIMEOUT_S = 120.0
REACH_TIMEOUT_S = 10.0
DESCRIBE = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]

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
    if _sqlite_file(uri) is not None:
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    if "://" not in uri and uri != "databricks":
        raise TrackingError(
            f"tracking URI {uri!r} is no URI. Give a server such as http://localhost:5000, "
            f"or a SQLite file: {SQLITE}{Path(uri).absolute() / 'mlflow.db'}"
        )
    return uri


def ensure_store(uri: str) -> None:
    """Create the SQLite file of a URI with MLflow's tables, unless it is there; other stores make their own.

    MLflow runs its migrations in every process that finds no tables, and they fail when two do so at once. Here one
    process migrates a new file under a lock and renames it into place: it is there as a whole or not at all.

    Raises:
        TrackingError: the file cannot be created, or is no SQLite file.
    """
    database = _sqlite_file(uri)
    if database is None:
        return
    with _mlflow_calls(uri):
        if not database.exists():
            _create_store(database)
        with database.open("rb") as file:
            if file.read(16) not in {b"", b"SQLite format 3\x00"}:
                raise TrackingError(f"tracking store {uri}: the file exists and is no SQLite database")


def ui_command(uri: str, port: int = 5000) -> list[str]:
    """Return the command that shows a store in MLflow's web pages, on this machine only.

    Raises:
        TrackingError: the store is a server, which has its own pages, or a SQLite file that does not exist.
    """
    if uri.startswith(("http://", "https://")):
        raise TrackingError(f"the tracking server {_shown(uri)} has its own pages; open it in a browser")
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        raise TrackingError(f"no runs are recorded in {database}; `fedloom demo` records the first ones")
    artifacts = [] if database is None else ["--artifacts-destination", _artifacts_beside(database)]
    where = ["--backend-store-uri", uri, *artifacts, "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "server", *where, "--workers", "1"]


class Tracking:
    """One experiment of one tracking server, in MLflow's sense of the word: a named list of runs."""

    def __init__(self, uri: str | None, *, experiment_name: str = "fedloom") -> None:
        """Open the store, or create it.

        Raises:
            TrackingError: it cannot be opened.
        """
        self.uri = tracking_uri(uri)
        ensure_store(self.uri)
        _check_reachable(self.uri)
        with _mlflow_calls(self.uri):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
            self._experiment_id = self._find_or_create(experiment_name)

    @contextlib.contextmanager
    def run(
        self, experiment: Experiment, *, tags: Mapping[str, str] = {}, parent_run_id: str | None = None
    ) -> Iterator["TrackedRun"]:
        """Record one run: its parameters at the start, how it ended at the end.

        A run that ends is FINISHED; KeyboardInterrupt and SystemExit make it KILLED, any other exception FAILED. The
        exception goes on its way.

        Raises:
            TrackingError: the store cannot be written.
        """
        run: TrackedRun | None = None
        try:
            with _without_interrupts(), _mlflow_calls(self.uri):
                run = self._start(experiment, tags, parent_run_id)
            run.parameters(experiment)
            yield run
        except BaseException as error:
            if run is not None:
                killed = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
                self._end_failing(run, "KILLED" if killed else "FAILED", error)
            raise
        self._end(run, "FINISHED")

    def _start(self, experiment: Experiment, tags: Mapping[str, str], parent_run_id: str | None) -> "TrackedRun":
        known = {
            "method": experiment.method.name,
            "seed": str(experiment.seed),
            "fedloom_version": fedloom.__version__,
            "mlflow.source.name": "fedloom",
        }
        version = _code_version()
        if version:
            known |= {"code_version": version, "mlflow.source.git.commit": version.removesuffix("-dirty")}
        if parent_run_id:
            known["mlflow.parentRunId"] = parent_run_id
        name = f"{experiment.name}/{experiment.method.name}"
        created = self._client.create_run(self._experiment_id, run_name=name, tags=known | dict(tags))
        return TrackedRun(self._client, self.uri, created.info.run_id)

    def _end(self, run: "TrackedRun", status: str) -> None:
        with _without_interrupts(), _mlflow_calls(self.uri):
            self._client.set_terminated(run.run_id, status)

    def _end_failing(self, run: "TrackedRun", status: str, error: BaseException) -> None:
        """Record how the run ended; what ended it matters more than a store that fails as well."""
        try:
            self._end(run, status)
        except TrackingError as also:
            error.add_note(f"The run's status {status} could not be recorded: {also}")

    def _find_or_create(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            database = _sqlite_file(self.uri)
            location = None if database is None else _artifacts_beside(database)
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking store {_shown(self.uri)}: the MLflow experiment {name!r} was deleted; "
                f"`mlflow experiments restore -x {found.experiment_id}` brings it back"
            )
        return str(found.experiment_id)


class TrackedRun:
    """A run that is being recorded. Every call is written before it returns."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._uri = uri
        self._history: dict[int, dict[str, float]] = {}

    def parameters(self, experiment: Experiment) -> None:
        """Record the resolved experiment: a parameter per key, its hash, and the file ``experiment.yaml``."""
        from mlflow.entities import Param

        resolved = experiment.model_dump(mode="json")
        values = flatten(resolved) | {"experiment.hash": experiment.hash}
        parameters = [Param(key, _shortened(value)) for key, value in values.items()]
        with _mlflow_calls(self._uri):
            for first in range(0, len(parameters), PARAMETERS_PER_CALL):
                self._client.log_batch(self.run_id, params=parameters[first : first + PARAMETERS_PER_CALL])
        self.text("experiment.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one round in one call. NaN and infinities are recorded as they are."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        with _mlflow_calls(self._uri):
            self._client.log_batch(self.run_id, metrics=points, synchronous=True)
        self._history.setdefault(step, {}).update({point.key: point.value for point in points})

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        with _mlflow_calls(self._uri):
            self._client.set_tag(self.run_id, name, value)

    def text(self, name: str, text: str) -> None:
        """Record a text file, e.g. ``reports/clients.csv``."""
        with _mlflow_calls(self._uri):
            self._client.log_text(self.run_id, text, name)

    def adapter(self, name: str, adapter: "Adapter", base: "BaseModel") -> None:
        """Record an adapter in PEFT's format under ``adapters/<name>/``, once PEFT has loaded it unchanged.

        Raises:
            AdapterError: PEFT would not load the same adapter; nothing is recorded.
            TrackingError: the store cannot be written.
        """
        from fedloom.platform.peft_format import save_adapter, verify_adapter

        with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
            folder = save_adapter(Path(temporary) / "adapter", adapter, base)
            verify_adapter(folder, adapter, base)
            with _mlflow_calls(self._uri):
                self._client.log_artifacts(self.run_id, str(folder), f"adapters/{name}")

    def plots(self) -> None:
        """Record curves of what was logged: accuracy and loss against rounds and against bytes, under ``plots/``."""
        with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
            for metric in ("eval/accuracy", "eval/loss"):
                rounds, traffic = _curve(self._history, metric)
                for points, kind, label in ((rounds, "round", "round"), (traffic, "bytes", "megabytes sent so far")):
                    if points:
                        image = curves({metric: points}, x_label=label, y_label=metric)
                        Path(temporary, f"{metric.removeprefix('eval/')}_by_{kind}.png").write_bytes(image)
            with _mlflow_calls(self._uri):
                self._client.log_artifacts(self.run_id, temporary, "plots")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings under dotted keys: text as it is, anything else as JSON."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _curve(
    history: Mapping[int, Mapping[str, float]], metric: str
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the metric against rounds, and against megabytes (nothing if no bytes were logged)."""
    rounds, traffic = [], []
    total = 0.0
    for step, metrics in sorted(history.items()):
        total = metrics.get("bytes/total", total)
        if metric in metrics:
            rounds.append((float(step), metrics[metric]))
            traffic.append((total / 1e6, metrics[metric]))
    return rounds, traffic if total else []


def _shortened(value: str) -> str:
    if len(value) <= MAX_PARAMETER_CHARACTERS:
        return value
    return value[: MAX_PARAMETER_CHARACTERS - 3] + "..."  # the whole stands in experiment.yaml


def _sqlite_file(uri: str) -> Path | None:
    path = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(path) if uri.startswith(SQLITE) and path not in {"", ":memory:"} else None


def _shown(uri: str) -> str:
    """Return a URI without the user and password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def _artifacts_beside(database: Path) -> str:
    return (database.parent / "artifacts").as_uri()


def _create_store(database: Path) -> None:
    from filelock import FileLock
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_name(f".{database.name}.lock"), timeout=LOCK_TIMEOUT_S):
        if database.exists():
            return
        beside = database.with_name(f".{database.name}.new")
        beside.unlink(missing_ok=True)  # of a process that was killed
        store = SqlAlchemyStore(f"{SQLITE}{beside}", _artifacts_beside(database))
        store.engine.dispose()
        beside.rename(database)


def _check_reachable(uri: str) -> None:
    """Fail at once for a server that is not there: MLflow itself would try for minutes."""
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
            raise TrackingError(f"the tracking server {_shown(uri)} does not answer: {reason}") from error


def _code_version() -> str | None:
    """Return the git commit of the checkout that this code runs from, marked ``-dirty`` if it was changed since."""
    here = Path(__file__).resolve()
    answers = []
    for question in (["ls-files", "--error-unmatch", here.name], DESCRIBE):
        command = ["git", "-C", str(here.parent), *question]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None  # no git, no checkout, or an installed package inside of somebody else's checkout
        answers.append(done.stdout.strip())
    return answers[-1]


@contextlib.contextmanager
def _mlflow_calls(uri: str) -> Iterator[None]:
    """Keep MLflow's log lines off the terminal, and turn its errors into one line."""
    import mlflow  # noqa: F401  (its import sets the levels of the loggers)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with _silence:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise TrackingError(f"tracking store {_shown(uri)}: {reason}") from error


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


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Put off a Ctrl-C until the block is done; a second one goes through."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # Python interrupts the main thread alone, and only with a handler of its own
        return
    waiting = []

    def put_off(number: int, frame: Any) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if waiting:
            signal.raise_signal(signal.SIGINT)
