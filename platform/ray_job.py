"""The Ray job that this process is the driver of, if it is one, and the command with which its work goes on."""

import json
import os
import shlex
from pathlib import Path

TOLD = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the variable, whose name it is, in which Ray tells a driver what its job is
JOB_KEY = "job_submission_id"  # in the metadata there


def current_job() -> str | None:
    """Return the id under which this process was submitted to a cluster, or ``None``."""
    try:
        return str(json.loads(os.environ[TOLD])["metadata"][JOB_KEY])
    except (KeyError, TypeError, ValueError):
        return None


def command_to_resume(name: str, *, sweep: bool = False) -> str:
    """Return what a user types, where this process was started from, to go on with a run or a sweep.

    A job's user is elsewhere: the command says in which folder of the cluster the run lies.
    """
    if current_job() is None:
        return f"fedloom sweep --resume {name}" if sweep else f"fedloom resume {name}"
    option = "--resume-sweep" if sweep else "--resume"
    return f"fedloom submit {option} {name} --folder {shlex.quote(str(Path.cwd()))}"
