"""Reading what is on record: runs by a filter, their metrics round by round, their files."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.platform.tracked_run import TrackedRun
from fedloom.platform.tracking_calls import PatientCalls, TrackingError, mlflow_calls
from fedloom.platform.tracking_store import check_reachable, sqlite_file, tracking_uri

FINISHED = "FINISHED"
PARENT_TAG, STOPPED_TAG, SWEEP_TAG = "mlflow.parentRunId", "fedloom.stopped", "fedloom.sweep"
RUNS_PER_CALL = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One run as the store lists it; ``status`` is MLflow's, ``metrics`` are the last values."""

    run_id: str
    name: str
    status: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


class Records:
    """The runs of a store, for readers. Nothing is created."""

    def __init__(self, uri: str | None) -> None:
        """Open the store.

        Raises:
            TrackingError: there is none, or it cannot be opened.
        """
        self.uri = tracking_uri(uri)
        database = sqlite_file(self.uri)
        if database is not None and not database.is_file():
            raise TrackingError(f"no runs are recorded in {database}; `fedloom demo` records the first ones")
        check_reachable(self.uri)
        with mlflow_calls(self.uri):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
            self._experiment_ids = [found.experiment_id for found in self._client.search_experiments()]

    def runs(self, filter_string: str = "") -> list[Recorded]:
        """Return the runs, of all experiments of the store, that an MLflow filter lets through; the oldest first.

        Raises:
            TrackingError: the filter is none, or the store cannot be read.
        """
        found: list[Any] = []
        token: str | None = None
        with mlflow_calls(self.uri):
            while token or not found:
                page = self._client.search_runs(
                    self._experiment_ids,
                    filter_string,
                    max_results=RUNS_PER_CALL,
                    order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
                    page_token=token,
                )
                found, token = found + list(page), page.token
                if not token:
                    break
        return [_recorded(run) for run in found]

    def run(self, run_id: str) -> Recorded:
        """Return one run.

        Raises:
            TrackingError: there is no such run.
        """
        with mlflow_calls(self.uri):
            return _recorded(self._client.get_run(run_id))

    def rounds(self, run_id: str, names: Sequence[str]) -> list[dict[str, float]]:
        """Return the metrics of each round that has one of these names, round 0 first."""
        rounds: dict[int, dict[str, float]] = {}
        with mlflow_calls(self.uri):
            for name in names:
                for point in self._client.get_metric_history(run_id, name):
                    rounds.setdefault(point.step, {})[name] = point.value
        return [rounds[step] for step in sorted(rounds)]

    @contextlib.contextmanager
    def artifact(self, run_id: str, path: str) -> Iterator[Path | None]:
        """Lend a copy of a run's file or folder; ``None`` if the run has none of this name."""
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            with mlflow_calls(self.uri):
                listed = self._client.list_artifacts(run_id, path.rpartition("/")[0] or None)
                there = any(entry.path == path for entry in listed)
                copy = Path(self._client.download_artifacts(run_id, path, folder)) if there else None
            yield copy

    def attach(self, run_id: str, folder: str, files: Mapping[str, bytes]) -> None:
        """Add files to a run, finished or not, in place of those of the same names."""
        TrackedRun(self._client, PatientCalls(uri=self.uri), run_id).files(folder, files)


def _recorded(run: Any) -> Recorded:
    return Recorded(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
    )
