"""What a job takes along: its files, under the paths that they will have on the cluster.

The job runs in a folder of the cluster's, and keeps its runs there. The files lie in it too, under names that follow
from what is in them::

    FOLDER/fedloom-runs/submitted/1f0c9a3b5d7e/experiment.yaml

so that a run which is resumed on a new cluster still finds its data.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from fedloom.jobs.job_client import JobError
from fedloom.jobs.presets import experiment_path
from fedloom.platform.base_model import is_local_model
from fedloom.platform.data.source import is_local_source
from fedloom.platform.errors import clipped
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import experiment_yaml, load_experiment, read_document, validated
from fedloom.platform.tracking_store import DEFAULT_FOLDER
from fedloom.tuning.space import experiment_at
from fedloom.tuning.sweep_file import Sweep

SUBMITTED = f"{DEFAULT_FOLDER}/submitted"
LARGEST_UPLOAD_BYTES = 256 * 2**20  # half of what a message of Ray's holds
# Keys that can name a file or a folder, and the place in a list where a sweep tries several values.
PATHS = re.compile(r"(model\.name|data\.source|population\.availability_trace|evaluation\.tasks\.\d+\.source)(\.\d+)?")


class JobFiles:
    """The files of one job."""

    def __init__(self, *, folder: str | None, upload_data: bool) -> None:
        """Begin with none.

        Args:
            folder: of the cluster, in which the job runs; ``None`` if the cluster says which.
            upload_data: whether local files of data are sent along.

        Raises:
            JobError: the folder is not absolute.
        """
        if folder is not None and not folder.startswith("/"):
            raise JobError(f"--folder {clipped(folder)}: it is a folder of the cluster; give its absolute path there")
        self._folder = folder
        self._upload_data = upload_data
        self._contents: dict[str, bytes] = {}
        self._size_bytes = 0

    def add_experiment(self, given: str, overrides: Sequence[str]) -> tuple[str, Experiment]:
        """Add an experiment, resolved; returns its path on the cluster, and what it is there.

        Raises:
            ExperimentError: it cannot be run as written.
            JobError: it names a file or a folder that the cluster does not have.
        """
        experiment = load_experiment(experiment_path(given), overrides)
        placed = validated(self._placed(experiment.model_dump(mode="json")), place=given)
        return self._add("experiment.yaml", experiment_yaml(placed).encode()), placed

    def add_sweep(self, sweep: Sweep) -> tuple[str, Experiment]:
        """Add a sweep and its experiment; returns the sweep's path on the cluster, and what all trials share.

        Raises:
            ExperimentError: the experiment cannot be run with what the sweep sets.
            JobError: it names a file or a folder that the cluster does not have.
        """
        document = self._placed(read_document(experiment_path(sweep.experiment)))
        values = self._placed(sweep.model_dump(mode="json"))
        base = experiment_at(document, values["set"], place=f"sweep {sweep.name}, set")
        values["experiment"] = self._add("experiment.yaml", _yaml(document))
        return self._add("sweep.yaml", _yaml(values)), base

    def write(self, folder: Path) -> bool:
        """Write the files into a folder; returns whether there are any."""
        for name, content in self._contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return bool(self._contents)

    def _add(self, name: str, content: bytes) -> str:
        place = f"{SUBMITTED}/{hashlib.sha256(content).hexdigest()[:12]}/{name}"
        self._contents[place] = content
        return place

    def _placed(self, document: Any, key: str = "") -> Any:
        """Return a document with every path in it as it will be on the cluster."""
        if isinstance(document, Mapping):
            # A sweep's values stand under `set` and `space`, by the keys of the experiment.
            inner = "" if key in {"set", "space"} else f"{key}."
            return {name: self._placed(value, f"{inner}{name}".lstrip(".")) for name, value in document.items()}
        if isinstance(document, list | tuple):
            return [self._placed(value, f"{key}.{index}") for index, value in enumerate(document)]
        matched = PATHS.fullmatch(key)
        return self._path(matched[1], document) if matched and isinstance(document, str) else document

    def _path(self, key: str, given: str) -> str:
        """Return the path on the cluster of what a key names; hub ids and what is built in stay as they are."""
        try:
            if not _is_local(key, given):
                return given
            path = Path(os.path.abspath(Path(given).expanduser()))
            if self._folder is not None and PurePosixPath(path).is_relative_to(self._folder):
                return str(path)
            if self._upload_data and key != "model.name" and path.is_file():
                return self._add(path.name, self._read(key, path))
        except (OSError, ValueError, RuntimeError) as error:
            raise JobError(f"key {key}: {clipped(repr(given))} cannot be looked up: {clipped(error)}") from error
        shared = "that all machines of the cluster share"
        where = f"the folder {shared}" if self._folder is None else f"{self._folder}, the folder {shared}"
        sent = "" if key == "model.name" else ", or send a file along with --upload-data"
        raise JobError(
            f"key {key}: {clipped(repr(given))} is a path of this machine, and the job would look for it on the "
            f"cluster. Put it into {where}, name it by its path there and give --folder{sent}."
        )

    def _read(self, key: str, path: Path) -> bytes:
        self._size_bytes += path.stat().st_size
        if self._size_bytes > LARGEST_UPLOAD_BYTES:
            raise JobError(
                f"key {key}: with {clipped(path.name)} there are {self._size_bytes} bytes of data, and at most "
                f"{LARGEST_UPLOAD_BYTES} are sent with a job. Put them into the folder that all machines of the "
                "cluster share, and give --folder."
            )
        return path.read_bytes()


def _is_local(key: str, given: str) -> bool:
    if key == "population.availability_trace":
        return True
    return is_local_model(given) if key == "model.name" else is_local_source(given)


def _yaml(values: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode()
