"""Runs on record, in MLflow: how they begin, go on and end.

Everything goes through ``MlflowClient``, so that MLflow's global state (active run, tracking URI) is left to the user's
own code. Without a server, runs lie in one SQLite file and a folder of artifacts beside it.
"""

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import fedloom
from fedloom.platform.code_version import code_version
from fedloom.platform.experiment import Experiment
from fedloom.platform.interrupts import without_interrupts
from fedloom.platform.tracked_run import TrackedRun
from fedloom.platform.tracking_calls import OUTAGE_LIMIT_S, PatientCalls, TrackingError, mlflow_calls, shown_uri
from fedloom.platform.tracking_read import PARENT_TAG, STOPPED_TAG
from fedloom.platform.tracking_store import (
    DEFAULT_FOLDER,
    artifacts_of,
    check_password,
    check_reachable,
    ensure_store,
    tracking_uri,
    ui_command,
)

__all__ = ["DEFAULT_FOLDER", "TrackedRun", "Tracking", "TrackingError", "ensure_store", "tracking_uri", "ui_command"]

START = "fedloom.start"  # a tag: the name under which a run is created, before it has an id


class Tracking:
    """One experiment of one tracking server, in MLflow's sense of the word: a named list of runs."""

    def __init__(
        self, uri: str | None, *, experiment_name: str = "fedloom", outage_limit_s: float = OUTAGE_LIMIT_S
    ) -> None:
        """Open the store, or create it. Once it is open, a run waits for it where it is away, up to a limit.

        Raises:
            TrackingError: it cannot be opened.
        """
        self.uri = tracking_uri(uri)
        ensure_store(self.uri)
        check_password(self.uri)
        check_reachable(self.uri)
        self._calls = PatientCalls(uri=self.uri, outage_limit_s=outage_limit_s)
        with mlflow_calls(self.uri):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        self._experiment_id = self._calls(lambda: self._find_or_create(experiment_name))

    @contextlib.contextmanager
    def run(
        self, experiment: Experiment, *, tags: Mapping[str, str] = {}, parent_run_id: str | None = None
    ) -> Iterator[TrackedRun]:
        """Record one run: its parameters at the start, how it ended at the end.

        A run that ends is FINISHED; KeyboardInterrupt and SystemExit make it KILLED, any other exception FAILED. The
        exception goes on its way.

        Raises:
            TrackingError: the store cannot be written.
        """
        start = uuid.uuid4().hex
        with self._recorded(lambda: self._start(experiment, {**tags, START: start}, parent_run_id)) as run:
            run.parameters(experiment)
            yield run

    @contextlib.contextmanager
    def resumed(self, run_id: str, *, tags: Mapping[str, str] = {}) -> Iterator[TrackedRun]:
        """Record more of a run that was cut; what it has logged already is not logged a second time.

        Raises:
            TrackingError: the store cannot be written, or has no such run.
        """
        with self._recorded(lambda: self._reopened(run_id, tags)) as run:
            yield run

    def finished(self, run_id: str) -> TrackedRun:
        """Return a run to add to, as it is: how it ended stays as it was."""
        return TrackedRun(self._client, self._calls, run_id)

    @contextlib.contextmanager
    def parent(self, name: str, *, tags: Mapping[str, str], resume: str | None = None) -> Iterator[TrackedRun]:
        """Record a run under which others stand, e.g. a sweep; ``resume`` is the id of one that was cut.

        Raises:
            TrackingError: the store cannot be written.
        """
        known = {"fedloom_version": fedloom.__version__, "mlflow.source.name": "fedloom", **tags}
        known[START] = uuid.uuid4().hex

        def started() -> TrackedRun:
            return self._created(name, known)

        with self._recorded(started if resume is None else lambda: self._reopened(resume, tags)) as run:
            yield run

    def find(self, tags: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the id and the status of the run that has these tags, or ``None``; the oldest, if there are more.

        Raises:
            TrackingError: the store cannot be read.
        """
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        oldest = ["attributes.start_time ASC"]
        found = self._calls(lambda: self._client.search_runs([self._experiment_id], wanted, order_by=oldest))
        return (found[0].info.run_id, found[0].info.status) if found else None

    def stopped(self, run_id: str, when: str) -> None:
        """Record that a run was ended on purpose before its last round.

        Raises:
            TrackingError: the store cannot be written.
        """
        self._calls(lambda: self._client.set_tag(run_id, STOPPED_TAG, when))
        self._calls(lambda: self._client.set_terminated(run_id, "FINISHED"))

    @contextlib.contextmanager
    def _recorded(self, opened: Callable[[], TrackedRun]) -> Iterator[TrackedRun]:
        """Open a run and record how it ends, also if it is interrupted while it is opened."""
        run: TrackedRun | None = None

        def guarded() -> None:
            nonlocal run
            with without_interrupts():
                run = opened()

        try:
            self._calls(guarded)
            assert run is not None
            yield run
            self._calls(lambda: self._end(run, "FINISHED"))
        except BaseException as error:
            if run is not None:
                killed = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
                self._end_failing(run, "KILLED" if killed else "FAILED", error)
            raise

    def _reopened(self, run_id: str, tags: Mapping[str, str]) -> TrackedRun:
        known = self._client.get_run(run_id).data
        run = TrackedRun(self._client, self._calls, run_id, logged=self._logged(run_id, known.metrics))
        self._client.update_run(run_id, status="RUNNING")
        if STOPPED_TAG in known.tags:
            self._client.delete_tag(run_id, STOPPED_TAG)  # it goes on
        for name, value in tags.items():
            self._client.set_tag(run_id, name, value)
        return run

    def _logged(self, run_id: str, names: Iterable[str]) -> Counter[tuple[str, int]]:
        """Count the points of these metrics by name and step."""
        points = (point for name in names for point in self._client.get_metric_history(run_id, name))
        return Counter((point.key, point.step) for point in points)

    def _start(self, experiment: Experiment, tags: Mapping[str, str], parent_run_id: str | None) -> TrackedRun:
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
            known[PARENT_TAG] = parent_run_id
        name = f"{experiment.name}/{experiment.method.name}"
        return self._created(name, known | dict(tags))

    def _created(self, name: str, tags: Mapping[str, str]) -> TrackedRun:
        """Create a run, or find it by its tag ``START`` where it was created already and the answer was lost."""
        made = self._client.search_runs([self._experiment_id], f"tags.`{START}` = '{tags[START]}'", max_results=1)
        run = made[0] if made else self._client.create_run(self._experiment_id, run_name=name, tags=tags)
        return TrackedRun(self._client, self._calls, run.info.run_id)

    def _end(self, run: TrackedRun, status: str) -> None:
        with without_interrupts():
            self._client.set_terminated(run.run_id, status)

    def _end_failing(self, run: TrackedRun, status: str, error: BaseException) -> None:
        """Record how the run ended, unless the store fails as well: what ended it matters more, and does not wait."""
        try:
            with mlflow_calls(self.uri):
                self._end(run, status)
            if isinstance(error, KeyboardInterrupt):
                error.add_note(f"the MLflow run is marked {status}")
        except TrackingError as also:
            error.add_note(f"The run's status {status} could not be recorded: {also}")

    def _find_or_create(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts_of(self.uri)))
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
