"""The folder of a sweep, from which it can go on.

::

    fedloom-runs/sweeps/NAME/sweep.yaml        the sweep, as it was given
                             experiment.yaml   the experiment that it names, as it was
                             sweep.json        an id of its own, and where it is recorded
                             tune/             Ray Tune's own state
                             locks/            what keeps two trials from playing one point at once
"""

import json
import uuid
from pathlib import Path
from typing import Any

import yaml

from fedloom.platform.errors import ExperimentError, nearest
from fedloom.platform.experiment_file import read_document
from fedloom.platform.tracking_calls import shown_uri
from fedloom.platform.tracking_store import DEFAULT_FOLDER
from fedloom.platform.whole_files import write_whole
from fedloom.tuning.sweep_file import load_sweep
from fedloom.tuning.sweep_plan import SweepPlan, plan_sweep

FILES = ("sweep.yaml", "experiment.yaml")


def folder_of_sweep(name: str) -> Path:
    """Return a sweep's folder, under the working directory."""
    return Path(DEFAULT_FOLDER, "sweeps", name)


def write_sweep(plan: SweepPlan, tracking_uri: str) -> Path:
    """Make a sweep's folder.

    Raises:
        ExperimentError: there is one of that name.
    """
    folder = folder_of_sweep(plan.sweep.name)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ExperimentError(
            f"sweep {plan.sweep.name!r}: {folder} is there already. Go on with it by `fedloom sweep --resume "
            f"{plan.sweep.name}`, or give this one another name."
        ) from error
    text = yaml.safe_dump(plan.sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_whole(folder / "sweep.yaml", text.encode())
    text = yaml.safe_dump(dict(plan.document), sort_keys=False, allow_unicode=True)
    write_whole(folder / "experiment.yaml", text.encode())
    known = tracking_uri if tracking_uri == shown_uri(tracking_uri) else None
    write_whole(folder / "sweep.json", json.dumps({"id": uuid.uuid4().hex, "tracking_uri": known}).encode())
    return folder


def read_sweep(name: str) -> tuple[SweepPlan, str | None]:
    """Return a sweep that was started here and where it is recorded; ``None`` if that holds a password.

    Raises:
        ExperimentError: there is none of that name, or its folder is damaged.
    """
    folder = folder_of_sweep(name)
    known = sorted(path.parent.name for path in folder.parent.glob("*/sweep.json"))
    if name not in known:
        raise ExperimentError(
            f"sweep {name!r}: there is none under {folder.parent}.{nearest(name, known)} "
            f"Known: {', '.join(known) or 'none'}."
        )
    plan = plan_sweep(load_sweep(folder / "sweep.yaml"), read_document(folder / "experiment.yaml"))
    uri = facts_of(name)["tracking_uri"]
    return plan, None if uri is None else str(uri)


def facts_of(name: str) -> dict[str, Any]:
    """Return the id of a sweep and where it is recorded.

    Raises:
        ExperimentError: its folder is damaged.
    """
    path = folder_of_sweep(name) / "sweep.json"
    try:
        facts = json.loads(path.read_bytes())
        return {"id": facts["id"], "tracking_uri": facts["tracking_uri"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path}: is damaged: {error}") from error
