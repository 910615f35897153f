"""``fedloom evaluate``: a finished run's adapter on tasks of the LM Evaluation Harness, recorded in the same run."""

import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedloom.platform.base_model import model_path
from fedloom.platform.errors import ExperimentError, FedloomError, clipped, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.run_folder import find, store_of
from fedloom.platform.tracking import Tracking

FACTS = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of what the harness returns, by task."""


class HarnessError(FedloomError):
    """The harness is not installed, or fails on a task."""


def evaluate_run(
    run: str,
    tasks: Sequence[str],
    *,
    include: Path | None,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    tracking_uri: str | None,
) -> None:
    """Evaluate the final adapter of the run whose id begins with ``run``, show the results and record them.

    Args:
        run: the run; it was started in this working directory and has reached its last round.
        tasks: names of tasks, groups or tags of the harness.
        include: a folder with more tasks, as YAML files of the harness.
        shots: solved examples before each question; by default what a task says.
        limit: questions of each task, at most.
        batch_size: sequences that the model reads at once.
        tracking_uri: where the run is recorded, if it was not written down.

    Raises:
        HarnessError: the harness is not installed, or fails on a task.
        FedloomError: there is no such run, adapter or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError("fedloom evaluate needs lm-eval, which is not installed: pip install 'fedloom[lm-eval]'")
    description = find(run)
    experiment = validated(description.experiment, place="run.json")
    if experiment.data.task != "causal_lm":
        raise ExperimentError(
            f"run {run!r}: data.task is {experiment.data.task!r}, and the harness evaluates language models alone"
        )
    manager = _task_manager(tasks, include)
    tracked = Tracking(store_of(description, tracking_uri)).finished(description.run_id)
    with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
        adapter = tracked.fetched("adapters/final", Path(temporary))
        found = _asked(experiment, adapter, tasks, manager, shots=shots, limit=limit, batch_size=batch_size)
    metrics = metrics_of(found["results"])
    tracked.log(experiment.rounds, metrics)
    for name in found["results"]:
        own = {fact: found[fact][name] for fact in FACTS if name in found.get(fact, {})}
        tracked.text(f"lm_eval/{name}.json", json.dumps(own, indent=1, default=str))
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


def _task_manager(tasks: Sequence[str], include: Path | None) -> Any:
    """Let the harness look for its tasks, and refuse names that it does not know."""
    if include is not None and not include.is_dir():
        raise HarnessError(f"--include: there is no folder {clipped(repr(str(include)))}")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if name not in manager.all_tasks:
            raise HarnessError(
                f"--task: lm-eval knows no {clipped(repr(name))}.{nearest(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists its tasks; --include names a folder with more."
            )
    return manager


def _asked(
    experiment: Experiment,
    adapter: Path,
    tasks: Sequence[str],
    manager: Any,
    *,
    shots: int | None,
    limit: int | None,
    batch_size: int,
) -> Mapping[str, Any]:
    """Let the harness load the base model with the adapter and ask its tasks."""
    import lm_eval

    model = {
        "pretrained": model_path(experiment.model.name),
        "revision": experiment.model.revision or "main",
        "peft": str(adapter),
        "dtype": experiment.model.dtype,
    }
    try:
        found: Mapping[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:  # a task is somebody's file, and the harness runs what it says
        said = clipped(" ".join(str(error).split()), 400)
        raise HarnessError(f"the harness failed on {', '.join(tasks)}: {type(error).__name__}: {said}") from error
    return found


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers among the harness's results as ``lm_eval/<task>/<metric>``.

    The harness names a metric and the filter of answers behind it, ``acc,none``; only a filter that is one is named.
    """
    metrics = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "sample_len":
                named = f"{task}/{metric}" if chosen in {"", "none"} else f"{task}/{metric}/{chosen}"
                metrics[f"lm_eval/{re.sub('[^A-Za-z0-9_./ -]', '_', named)}"] = float(value)
    return metrics
