"""``fedloom jobs``, ``status``, ``logs`` and ``stop``: what a cluster knows of its jobs, shown."""

import asyncio
import datetime

import typer
from ray.job_submission import JobDetails, JobStatus
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.jobs.job_client import HASH, KIND, NAME, Jobs
from fedloom.platform.errors import clipped
from fedloom.platform.interrupts import INTERRUPTED


def show_jobs(address: str) -> None:
    """Print the jobs of a cluster in a table, the newest first.

    Raises:
        JobError: the cluster cannot be asked.
    """
    console = Console()
    listed = Jobs(address).all()
    if not listed:
        console.print(f"no jobs at {address}", highlight=False, soft_wrap=True)
        return
    console.print(table_of(listed))


def table_of(jobs: list[JobDetails]) -> Table:
    """Return jobs in a table; of those that `fedloom submit` has not made, only what Ray knows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # it fits 80 columns
    for name in ("job", "status", "what", "hash", "started"):
        table.add_column(name, no_wrap=name != "what", overflow="fold")
    for job in jobs:
        facts = _facts(job)
        what = " ".join(facts[key] for key in (KIND, NAME) if key in facts)
        cells = (job.submission_id or "", job.status.lower(), clipped(what, 60), facts.get(HASH, ""), _started(job))
        table.add_row(*map(Text, cells))
    return table


def show_status(address: str, job: str) -> None:
    """Print what is known of a job.

    Raises:
        JobError: the cluster cannot be asked, or has no such job.
    """
    known = Jobs(address).one(job)
    facts = _facts(known)
    said = {
        "job": known.submission_id,
        "status": known.status.lower(),
        "kind": facts.get(KIND),
        "name": facts.get(NAME),
        "hash": facts.get(HASH),
        "started": _started(known),
        "took": _took(known),
        "message": (known.message or "").partition("\n")[0],  # what follows is in the logs
    }
    for name, value in said.items():
        if value:
            Console().print(Text(f"{name:8} {value}"), soft_wrap=True)


def show_logs(address: str, job: str, *, follow: bool) -> None:
    """Print what a job has printed; with ``follow`` until it ends, and end with 1 if it failed.

    Raises:
        JobError: the cluster cannot be asked, or has no such job.
    """
    jobs = Jobs(address)
    if not follow:
        typer.echo(jobs.logs(job), nl=False)
        return
    try:
        asyncio.run(_print_followed(jobs, job))
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {job} goes on; `fedloom stop` ends it", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if jobs.one(job).status == JobStatus.FAILED:
        raise typer.Exit(1)


async def _print_followed(jobs: Jobs, job: str) -> None:
    async for lines in jobs.follow(job):
        typer.echo(lines, nl=False)


def stop_job(address: str, job: str) -> None:
    """Ask a job to end, and say whether there was anything to end.

    Raises:
        JobError: the cluster cannot be asked, or has no such job.
    """
    jobs = Jobs(address)
    known = jobs.one(job)
    if jobs.stop(job):
        said = "is asked to end"
        if KIND in _facts(known):
            said += f"; its run is marked KILLED and goes on with `fedloom submit --resume {job}`"
    else:
        said = f"has ended already: {known.status.lower()}"
    Console().print(f"{job} {said}", highlight=False, soft_wrap=True)


def _facts(job: JobDetails) -> dict[str, str]:
    return job.metadata or {}


def _started(job: JobDetails) -> str:
    if job.start_time is None:
        return ""
    return datetime.datetime.fromtimestamp(job.start_time / 1000).strftime("%m-%d %H:%M")


def _took(job: JobDetails) -> str:
    """Return how long a job that has ended took."""
    if job.start_time is None or not job.end_time:
        return ""
    return str(datetime.timedelta(seconds=round((job.end_time - job.start_time) / 1000)))
