"""The job server of a Ray cluster, over HTTP: what it is asked, and its errors in one line each."""

import contextlib
import logging
import os
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from fedloom.platform.errors import FedloomError, clipped, nearest
from fedloom.platform.ray_tokens import TOKEN_HELP, choose_tokens

KIND, NAME, HASH = "fedloom.kind", "fedloom.name", "fedloom.hash"  # what is shown with a job
FOLDER, RESUMES = "fedloom.folder", "fedloom.resumes"  # what `submit` was told with --folder and --resume
OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to the address that it is given
REACH_TIMEOUT_S = 10.0
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # loggers
STOP_WAIT_S = 60  # from SIGTERM to SIGKILL: a run ends its record first


class JobError(FedloomError):
    """A job cannot be submitted, found or asked about."""


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            JobError: the address is none, nobody answers there, or lets us in.
        """
        self.address = address.rstrip("/")
        _check_address(self.address)
        choose_tokens()
        for name in OVERRIDING:
            os.environ.pop(name, None)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._explained():
            self._client = JobSubmissionClient(self.address)

    def submit(self, command: str, *, wheel: str, folder: str | None, facts: Mapping[str, str]) -> str:
        """Submit a job and return its id.

        Everything given here can be read in the dashboard and by whoever may use the cluster.

        Args:
            command: for a shell on the cluster.
            wheel: path of the code that is sent along.
            folder: of the files that are sent along.
            facts: names and values that are shown with the job.
        """
        environment: dict[str, Any] = {
            "py_modules": [wheel],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }
        if folder is not None:
            environment["working_dir"] = folder
        with self._explained():
            job = self._client.submit_job(entrypoint=command, runtime_env=environment, metadata=dict(facts))
        return str(job)

    def all(self) -> list[JobDetails]:
        """Return the jobs that were submitted to this cluster, the newest first."""
        with self._explained():
            listed = self._client.list_jobs()
        submitted = [job for job in listed if job.submission_id is not None]
        return sorted(submitted, key=lambda job: job.start_time or 0, reverse=True)

    def known(self) -> dict[str, JobDetails]:
        """Return all jobs that were submitted by their ids, the newest first."""
        return {job.submission_id: job for job in self.all() if job.submission_id is not None}

    def one(self, job: str) -> JobDetails:
        """Return what is known of a job.

        Raises:
            JobError: there is none of this id.
        """
        known = self.known()
        if job not in known:
            raise JobError(
                f"job {clipped(repr(job))}: there is none at {self.address}.{nearest(job, known)} "
                f"`fedloom jobs` lists {len(known)}; jobs are forgotten with their cluster."
            )
        return known[job]

    def logs(self, job: str) -> str:
        """Return what a job has printed so far."""
        self.one(job)
        with self._explained():
            return str(self._client.get_job_logs(job))

    async def follow(self, job: str) -> AsyncIterator[str]:
        """Yield what a job has printed and prints, until it ends."""
        self.one(job)
        with self._explained():
            async for lines in self._client.tail_job_logs(job):
                yield lines

    def stop(self, job: str) -> bool:
        """Ask a job to end; returns whether it was running."""
        self.one(job)
        with self._explained():
            return bool(self._client.stop_job(job))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in a line what has gone wrong between here and the job server."""
        said = f"--address {self.address}"
        try:
            yield
        except AuthenticationError as error:
            which = "asks for another token" if "Invalid" in str(error) else "asks for a token, and there is none here"
            raise JobError(f"{said}: the cluster {which}. {TOKEN_HELP}") from error
        except (requests.RequestException, OSError) as error:
            raise JobError(f"{said}: no Ray job server answers there: {_line(error)}") from error
        except (RuntimeError, ValueError) as error:
            raise JobError(f"{said}: the job server refused: {_line(error)}") from error


def _check_address(address: str) -> None:
    """Refuse what is no job server's address, before anything is sent there."""
    example = "write it as http://HOST:PORT, e.g. http://127.0.0.1:8265"
    if "@" in address:
        raise JobError(f"--address: it holds a user or a password; {example}. {TOKEN_HELP}")
    match = re.fullmatch(r"https?://(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]{1,5})?", address)
    if match is None:
        raise JobError(f"--address {clipped(address)}: no address of a job server; {example}")
    parts = urllib.parse.urlsplit(address)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise JobError(f"--address {address}: no Ray job server answers there: {error}") from error


def _line(error: Exception) -> str:
    return clipped(" ".join(str(error).split()), 400)
