"""The folder of a run, from which it can go on: where it lies, and what it says of the run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedloom
from fedloom.platform.errors import CheckpointError, ExperimentError, clipped, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.ray_job import current_job
from fedloom.platform.reading import inside, read_bounded
from fedloom.platform.tracked_run import flatten
from fedloom.platform.tracking_calls import shown_uri
from fedloom.platform.tracking_store import DEFAULT_FOLDER
from fedloom.platform.whole_files import write_whole

DESCRIPTION = "run.json"
JOBS = "jobs.txt"  # the ids of the Ray jobs that have played rounds of the run, one a line
MOST_JOBS_BYTES = 2**16
SHOWN_DIGITS = 8  # of a run's id, which a command line takes for the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a run was started with.

    Attributes:
        run_id: MLflow's.
        experiment: resolved, as JSON values.
        fingerprint: of the data.
        tracking_uri: ``None`` if it holds a password, which is not written down.
        versions: of what the bits may depend on.
    """

    run_id: str
    experiment: Mapping[str, Any]
    fingerprint: str
    tracking_uri: str | None
    versions: Mapping[str, str]


def folder_of(run_id: str) -> Path:
    """Return the folder of a run, under the working directory.

    Raises:
        CheckpointError: the id, which a tracking server has chosen, is no plain name.
    """
    if not re.fullmatch(r"[\w-]{1,128}", run_id, re.ASCII):
        raise CheckpointError(f"run {clipped(repr(run_id))}: an id has letters, digits, - and _, at most 128")
    return Path(DEFAULT_FOLDER, "checkpoints", run_id)


def versions() -> dict[str, str]:
    """Return the versions of what the bits may depend on."""
    return {"fedloom": fedloom.__version__, "torch": torch.__version__}


def describe(run_id: str, experiment: Experiment, *, fingerprint: str, tracking_uri: str) -> None:
    """Write what a run was started with into its folder.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    values = {
        "run_id": run_id,
        "experiment": experiment.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "tracking_uri": tracking_uri if tracking_uri == shown_uri(tracking_uri) else None,
        "versions": versions(),
    }
    write_whole(folder_of(run_id) / DESCRIPTION, json.dumps(values, indent=1).encode())


def is_described(run_id: str) -> bool:
    """Whether a run's description is there."""
    return (folder_of(run_id) / DESCRIPTION).exists()


def note_job(run_id: str) -> None:
    """Write down that the job which this process is, if it is one, plays the run.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    job = current_job()
    if job is None:
        return
    known = _jobs_of(run_id)
    if job not in known:
        write_whole(folder_of(run_id) / JOBS, "".join(f"{each}\n" for each in [*known, job]).encode())


def _jobs_of(run_id: str) -> list[str]:
    """Return the jobs that have played a run; none where that cannot be read, for the run's id will do as well."""
    try:
        return read_bounded(inside(folder_of(run_id), JOBS), MOST_JOBS_BYTES).decode().split()
    except (OSError, ValueError):
        return []


def find(run: str) -> Description:
    """Return the description of the run whose id begins with ``run``, or that a Ray job of this id has played.

    Raises:
        CheckpointError: there is none or more than one, or its description cannot be read.
    """
    known = sorted(path.parent.name for path in folder_of("any").parent.glob(f"*/{DESCRIPTION}"))
    matching = [name for name in known if run and name.startswith(run)]
    matching = matching or [name for name in known if run in _jobs_of(name)]
    if len(matching) != 1:
        listed = ", ".join(name[:SHOWN_DIGITS] for name in known) or "none"
        problem = f"{len(matching)} runs begin so." if matching else f"no such run.{nearest(run, known)}"
        raise CheckpointError(f"run {run!r}: {problem} Under {folder_of('any').parent} there are: {listed}.")
    path = folder_of(matching[0]) / DESCRIPTION
    try:
        return Description(**json.loads(inside(folder_of(matching[0]), DESCRIPTION).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error


def store_of(description: Description, given: str | None) -> str:
    """Return the tracking URI of a run: the given one, or that which was written down.

    Raises:
        CheckpointError: there is neither.
    """
    uri = given or description.tracking_uri
    if uri is None:
        raise CheckpointError(
            f"run {description.run_id[:SHOWN_DIGITS]!r}: it was recorded on a server with a password, which is not "
            "written down. Give --tracking-uri."
        )
    return uri


def described_experiment(description: Description, overrides: Sequence[str], *, allow_changes: bool) -> Experiment:
    """Return the experiment of a run, with overrides if they are allowed.

    Raises:
        ExperimentError: overrides change it and may not; it names the changed keys.
    """
    before = validated(description.experiment, place=DESCRIPTION)
    after = validated(description.experiment, place=DESCRIPTION, overrides=overrides)
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed and not allow_changes:
        raise ExperimentError(
            f"--set: a run goes on as it was started, and these keys would change: {', '.join(changed)}. "
            "With --allow-changes it goes on all the same, but its rounds are then not those of one experiment."
        )
    return after
