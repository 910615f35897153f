"""``fedloom submit``: a run, a sweep, or what is left of one, as a job of a Ray cluster."""

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray.job_submission import JobDetails

from fedloom.jobs.job_client import FOLDER, HASH, KIND, NAME, RESUMES, JobError, Jobs
from fedloom.jobs.job_files import JobFiles
from fedloom.jobs.presets import sweep_names, sweep_path
from fedloom.jobs.wheel import write_wheel
from fedloom.platform.errors import clipped
from fedloom.platform.experiment_file import read_document
from fedloom.platform.tracking_calls import shown_uri
from fedloom.tuning.sweep_file import load_sweep

RUN, SWEEP, RESUMED = "run", "sweep", "resumed "  # kinds of jobs; a resumed one says so before its own
HERE = '"${FEDLOOM_FOLDER:-$HOME}"'  # for the shell of the cluster, which knows it
"""The folder of the cluster in which a job runs, unless `--folder` says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a job goes.

    Attributes:
        address: of the cluster's job server.
        folder: of the cluster, in which the job runs; ``None`` if the cluster says which.
        upload_data: whether local files of data are sent along.
        tracking_uri: where the run is recorded; ``None`` if the cluster says where.
    """

    address: str
    folder: str | None = None
    upload_data: bool = False
    tracking_uri: str | None = None


def submit_file(given: str, overrides: Sequence[str], target: Target) -> str:
    """Submit an experiment or a sweep, whichever the file holds: a sweep has a ``space``. Returns the job's id.

    Raises:
        FedloomError: something in it cannot work, or the cluster cannot be reached or refuses.
    """
    files = JobFiles(folder=target.folder, upload_data=target.upload_data)
    path = _sweep_file(given)
    if path is None:
        place, experiment = files.add_experiment(given, overrides)
        facts = {KIND: RUN, NAME: experiment.name, HASH: experiment.hash}
        return _submit(["run", place], files, facts, target)
    if overrides:
        raise JobError(f"--set {clipped(overrides[0])}: a sweep has its keys in its file, under `set`")
    sweep = load_sweep(path)
    place, base = files.add_sweep(sweep)
    return _submit(["sweep", place], files, {KIND: SWEEP, NAME: sweep.name, HASH: base.hash}, target)


def submit_resume(name: str, target: Target, *, sweep: bool) -> str:
    """Submit what is left of a run, of a sweep, or of what a job has done; returns the job's id.

    A job that the cluster still knows says what it was, and in which folder. One that was lost with its cluster is
    looked for in the folder: the runs there know the jobs that have played them.

    Args:
        name: how the id of the run begins, the sweep's name, or, unless ``sweep``, the id of a job.
        target: where the job goes; in its folder the run was started.
        sweep: whether it is one.

    Raises:
        JobError: the cluster cannot be reached or refuses, or the job still runs or is none of Fedloom's.
    """
    shown = {NAME: name}
    job = None if sweep else Jobs(target.address).known().get(name)
    if job is not None:
        name, sweep, folder = what_ran(job)
        target = replace(target, folder=target.folder or folder)
        shown = {key: value for key, value in (job.metadata or {}).items() if key in (NAME, HASH)}
    arguments = ["sweep", "--resume", name] if sweep else ["resume", name]
    facts = {**shown, KIND: RESUMED + (SWEEP if sweep else RUN), RESUMES: name}
    return _submit(arguments, JobFiles(folder=target.folder, upload_data=False), facts, target)


def what_ran(job: JobDetails) -> tuple[str, bool, str | None]:
    """Return what a job stands for: how its run is named, whether it is a sweep, and its folder if it was given one.

    Raises:
        JobError: the job still runs, or is none of Fedloom's.
    """
    id, facts = job.submission_id or "", job.metadata or {}
    kind = facts.get(KIND)
    if kind is None:
        raise JobError(
            f"--resume {id}: that job was not sent by `fedloom submit`; give the id of its run, and --folder"
        )
    if not job.status.is_terminal():
        raise JobError(f"--resume {id}: that job is {job.status.lower()}; `fedloom stop {id}` ends it")
    sweep = kind.endswith(SWEEP)  # whose name is known; which run a job has begun is known in its folder alone
    return facts.get(RESUMES) or (facts.get(NAME, id) if sweep else id), sweep, facts.get(FOLDER)


def _sweep_file(given: str) -> Path | None:
    """Return the file of the sweep that a user means; ``None`` if it is an experiment."""
    if Path(given).is_file():
        return Path(given) if "space" in read_document(Path(given)) else None
    return sweep_path(given) if given in sweep_names() else None


def _submit(arguments: list[str], files: JobFiles, facts: Mapping[str, str], target: Target) -> str:
    """Submit a command of Fedloom's with the code that runs here; returns the job's id."""
    recorded = [] if target.tracking_uri is None else ["--tracking-uri", _without_password(target.tracking_uri)]
    jobs = Jobs(target.address)
    facts = facts if target.folder is None else {**facts, FOLDER: target.folder}
    with tempfile.TemporaryDirectory(prefix="fedloom-job-") as scratch:
        sent = Path(scratch, "files")
        has_files = files.write(sent)
        return jobs.submit(
            command_of([*arguments, *recorded], folder=target.folder, has_files=has_files),
            wheel=str(write_wheel(Path(scratch))),
            folder=str(sent) if has_files else None,
            facts=facts,
        )


def command_of(arguments: list[str], *, folder: str | None, has_files: bool) -> str:
    """Return the command of a job: its files are put where they stay, and Fedloom runs there.

    ``-P`` keeps folders that lie there, of whatever name, from being imported.
    """
    place = HERE if folder is None else shlex.quote(folder)
    copied = f"cp -R . {place} && " if has_files else ""
    run = shlex.join(["python", "-P", "-m", "fedloom.jobs.main", *arguments, "--address", "auto"])
    return f"mkdir -p {place} && {copied}cd {place} && exec {run}"


def _without_password(uri: str) -> str:
    if uri != shown_uri(uri):
        raise JobError(
            f"--tracking-uri {shown_uri(uri)}: it holds a user, a password or options, and what is sent with a job can "
            "be read in the dashboard. Set MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD where the cluster's machines are started."
        )
    return uri
