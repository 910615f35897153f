"""Runs on record: parameters, metrics per round, adapters and plots, in MLflow.

Everything goes through ``MlflowClient``, so that MLflow's global state (active run, tracking URI) is left to the user's
own code. Without a server, runs lie in one SQLite file and a folder of artifacts beside it.
"""

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedloom
from fedloom.platform.code_version import code_version
from fedloom.platform.errors import clipped
from fedloom.platform.experiment import Experiment
from fedloom.platform.interrupts import without_interrupts
from fedloom.platform.tracking_store import (
    DEFAULT_FOLDER,
    TrackingError,
    artifacts_beside,
    check_password,
    check_reachable,
    ensure_store,
    mlflow_calls,
    shown_uri,
    sqlite_file,
    tracking_uri,
    ui_command,
)

if TYPE_CHECKING:  # they import torch, which `fedloom ui` and other readers of the store do without
    from fedloom.platform.adapter import Adapter
    from fedloom.platform.peft_format import BaseModel

__all__ = ["DEFAULT_FOLDER", "TrackedRun", "Tracking", "TrackingError", "ensure_store", "tracking_uri", "ui_command"]

MAX_PARAMETER_CHARACTERS = 6000  # MLflow's own limit
PARAMETERS_PER_CALL = 100  # likewise


class Tracking:
    """One experiment of one tracking server, in MLflow's sense of the word: a named list of runs."""

    def __init__(self, uri: str | None, *, experiment_name: str = "fedloom") -> None:
        """Open the store, or create it.

        Raises:
            TrackingError: it cannot be opened.
        """
        self.uri = tracking_uri(uri)
        ensure_store(self.uri)
        check_password(self.uri)
        check_reachable(self.uri)
        with mlflow_calls(self.uri):
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
        with self._recorded(lambda: self._start(experiment, tags, parent_run_id)) as run:
            run.parameters(experiment)
            yield run

    @contextlib.contextmanager
    def resumed(self, run_id: str, *, tags: Mapping[str, str] = {}) -> Iterator["TrackedRun"]:
        """Record more of a run that was cut; what it has logged already is not logged a second time.

        Raises:
            TrackingError: the store cannot be written, or has no such run.
        """
        with self._recorded(lambda: self._reopened(run_id, tags)) as run:
            yield run

    @contextlib.contextmanager
    def _recorded(self, opened: Callable[[], "TrackedRun"]) -> Iterator["TrackedRun"]:
        """Open a run and record how it ends, also if it is interrupted while it is opened."""
        run: TrackedRun | None = None
        try:
            with without_interrupts(), mlflow_calls(self.uri):
                run = opened()
            yield run
            self._end(run, "FINISHED")
        except BaseException as error:
            if run is not None:
                killed = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
                self._end_failing(run, "KILLED" if killed else "FAILED", error)
            raise

    def _reopened(self, run_id: str, tags: Mapping[str, str]) -> "TrackedRun":
        run = TrackedRun(self._client, self.uri, run_id, logged=self._logged(run_id))
        self._client.update_run(run_id, status="RUNNING")
        for name, value in tags.items():
            self._client.set_tag(run_id, name, value)
        return run

    def _logged(self, run_id: str) -> Counter[tuple[str, int]]:
        """Count the points of every metric and step."""
        names = self._client.get_run(run_id).data.metrics
        points = (point for name in names for point in self._client.get_metric_history(run_id, name))
        return Counter((point.key, point.step) for point in points)

    def _start(self, experiment: Experiment, tags: Mapping[str, str], parent_run_id: str | None) -> "TrackedRun":
        known = {
            "method": experiment.method.name,
            "seed": str(experiment.seed),
            "fedloom_version": fedloom.__version__,
            "mlflow.source.name": "fedloom",
        }
        version = code_version()
        if version:
            known |= {"code_version": version, "mlflow.source.git.commit": version.removesuffix("-dirty")}
        if parent_run_id:
            known["mlflow.parentRunId"] = parent_run_id
        name = f"{experiment.name}/{experiment.method.name}"
        created = self._client.create_run(self._experiment_id, run_name=name, tags=known | dict(tags))
        return TrackedRun(self._client, self.uri, created.info.run_id)

    def _end(self, run: "TrackedRun", status: str) -> None:
        with without_interrupts(), mlflow_calls(self.uri):
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
            database = sqlite_file(self.uri)
            location = None if database is None else artifacts_beside(database)
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking store {shown_uri(self.uri)}: the MLflow experiment {name!r} was deleted; "
                f"`mlflow experiments restore -x {found.experiment_id}` brings it back"
            )
        return str(found.experiment_id)


class TrackedRun:
    """A run that is being recorded. Every call is written before it returns."""

    def __init__(self, client: Any, uri: str, run_id: str, logged: Counter[tuple[str, int]] | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._uri = uri
        self._logged = logged or Counter()  # points that stand in the store and are to be passed over

    def parameters(self, experiment: Experiment) -> None:
        """Record the resolved experiment: a parameter per key, its hash, and the file ``experiment.yaml``."""
        from mlflow.entities import Param

        from fedloom.platform.experiment_file import experiment_yaml

        values = flatten(experiment.model_dump(mode="json")) | {"experiment.hash": experiment.hash}
        parameters = [Param(key, _shortened(value)) for key, value in values.items()]
        with mlflow_calls(self._uri):
            for first in range(0, len(parameters), PARAMETERS_PER_CALL):
                self._client.log_batch(self.run_id, params=parameters[first : first + PARAMETERS_PER_CALL])
        self.text("experiment.yaml", experiment_yaml(experiment))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one round in one call. NaN and infinities are recorded as they are."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        known = [name for name in metrics if self._logged[name, step] > 0]
        self._logged.subtract((name, step) for name in known)
        points = [Metric(name, float(value), now_ms, step) for name, value in metrics.items() if name not in known]
        if not points:
            return
        with mlflow_calls(self._uri):
            self._client.log_batch(self.run_id, metrics=points, synchronous=True)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        with mlflow_calls(self._uri):
            self._client.set_tag(self.run_id, name, value)

    def text(self, name: str, text: str) -> None:
        """Record a text file, e.g. ``reports/clients.csv``."""
        path = _artifact(name)
        with mlflow_calls(self._uri):
            self._client.log_text(self.run_id, text, path)

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
            with mlflow_calls(self._uri):
                self._client.log_artifacts(self.run_id, str(folder), _artifact(f"adapters/{name}"))

    def files(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Record files by name under ``folder``; the empty folder is the top."""
        path = _artifact(folder) or None
        with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
            for name, content in files.items():
                Path(temporary, _artifact(name)).write_bytes(content)
            with mlflow_calls(self._uri):
                self._client.log_artifacts(self.run_id, temporary, path)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings under dotted keys: text as it is, anything else as JSON."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _artifact(name: str) -> str:
    """Return the path of an artifact, which stays under those of its run.

    Raises:
        TrackingError: it would not.
    """
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
        raise TrackingError(f"artifact {clipped(repr(name))}: its path leads out of the run")
    return name


def _shortened(value: str) -> str:
    if len(value) <= MAX_PARAMETER_CHARACTERS:
        return value
    return value[: MAX_PARAMETER_CHARACTERS - 3] + "..."  # the whole stands in experiment.yaml
