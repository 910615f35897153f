"""A run that is being recorded: parameters, metrics per round, adapters and plots."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.platform.errors import clipped
from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking_calls import PatientCalls, TrackingError

if TYPE_CHECKING:  # they import torch, which `fedloom ui` and other readers of the store do without
    from fedloom.platform.adapter import Adapter
    from fedloom.platform.peft_format import BaseModel

MAX_PARAMETER_CHARACTERS = 6000  # MLflow's own limit
PARAMETERS_PER_CALL = 100  # likewise


class TrackedRun:
    """A run that is being recorded. Every call is written before it returns, also where the store is away for a while.

    Any of them may be made twice: files and tags are replaced, and MLflow keeps one of two points that are equal in
    name, step, value and time.
    """

    def __init__(
        self, client: Any, calls: PatientCalls, run_id: str, logged: Counter[tuple[str, int]] | None = None
    ) -> None:
        self.run_id = run_id
        self._client = client
        self._calls = calls
        self._logged = logged or Counter()  # points that stand in the store and are to be passed over

    def parameters(self, experiment: Experiment) -> None:
        """Record the resolved experiment: a parameter per key, its hash, and the file ``experiment.yaml``."""
        from fedloom.platform.experiment_file import experiment_yaml

        self.values(flatten(experiment.model_dump(mode="json")) | {"experiment.hash": experiment.hash})
        self.text("experiment.yaml", experiment_yaml(experiment))

    def values(self, values: Mapping[str, str]) -> None:
        """Record parameters."""
        from mlflow.entities import Param

        parameters = [Param(key, _shortened(value)) for key, value in values.items()]
        for first in range(0, len(parameters), PARAMETERS_PER_CALL):
            batch = parameters[first : first + PARAMETERS_PER_CALL]
            self._calls(partial(self._client.log_batch, self.run_id, params=batch))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one round in one call. NaN and infinities are recorded as they are."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        known = [name for name in metrics if self._logged[name, step] > 0]
        self._logged.subtract((name, step) for name in known)
        points = [Metric(name, float(value), now_ms, step) for name, value in metrics.items() if name not in known]
        if not points:
            return
        self._calls(partial(self._client.log_batch, self.run_id, metrics=points, synchronous=True))

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._calls(partial(self._client.set_tag, self.run_id, name, value))

    def text(self, name: str, text: str) -> None:
        """Record a text file, e.g. ``reports/clients.csv``."""
        self._calls(partial(self._client.log_text, self.run_id, text, _artifact(name)))

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
            self._calls(partial(self._client.log_artifacts, self.run_id, str(folder), _artifact(f"adapters/{name}")))

    def files(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Record files by name under ``folder``; the empty folder is the top."""
        path = _artifact(folder) or None
        with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
            for name, content in files.items():
                Path(temporary, _artifact(name)).write_bytes(content)
            self._calls(partial(self._client.log_artifacts, self.run_id, temporary, path))

    def register(self, name: str, folder: str, tags: Mapping[str, str]) -> int:
        """Enter a recorded folder, e.g. ``adapters/final``, into the model registry, once; returns the version.

        Args:
            name: of the registered model; it is made if there is none.
            folder: what is registered.
            tags: where it comes from.

        Raises:
            TrackingError: the registry cannot be written.
        """
        known = self._calls(partial(self._client.search_model_versions, f"run_id = '{self.run_id}'"))
        for version in known:
            if version.name == name:
                return int(version.version)
        if not self._calls(partial(self._client.search_registered_models, f"name = '{name}'")):
            self._calls(partial(self._client.create_registered_model, name))
        source = f"{self._calls(partial(self._client.get_run, self.run_id)).info.artifact_uri}/{folder}"
        made = partial(self._client.create_model_version, name, source, run_id=self.run_id, tags=dict(tags))
        return int(self._calls(made).version)

    def fetched(self, folder: str, into: Path) -> Path:
        """Copy a recorded folder, e.g. ``adapters/final``, into another and return the copy.

        Raises:
            TrackingError: the run has recorded nothing under this name.
        """
        if not self._calls(partial(self._client.list_artifacts, self.run_id, folder)):
            raise TrackingError(f"run {self.run_id}: {folder!r} is not recorded; has it reached its last round?")
        return Path(self._calls(partial(self._client.download_artifacts, self.run_id, folder, str(into))))


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
