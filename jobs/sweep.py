"""``fedloom sweep``: trials of one experiment over a search space, and a table of how they ended."""

from collections.abc import Sequence
from typing import Any

from ray import tune
from rich.console import Console
from rich.table import Table

from fedloom.jobs.display import wide_table
from fedloom.jobs.presets import experiment_path, sweep_path
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_file import read_document
from fedloom.platform.interrupts import sigterm_interrupts
from fedloom.platform.ray_job import command_to_resume
from fedloom.platform.run_folder import SHOWN_DIGITS
from fedloom.platform.tracking import Tracking
from fedloom.tuning.comparison.groups import METHOD, short_names
from fedloom.tuning.space import shown_point
from fedloom.tuning.sweep import TrialResult, best_first, result_of, run_sweep
from fedloom.tuning.sweep_file import Sweep, load_sweep
from fedloom.tuning.sweep_folder import read_sweep, write_sweep
from fedloom.tuning.sweep_plan import SweepPlan, plan_sweep


def start_sweep(file: str, *, address: str | None, tracking_uri: str | None, dry_run: bool) -> None:
    """Start a sweep from its file.

    Raises:
        FedloomError: something in it cannot work, or a sweep of its name was started here before.
    """
    sweep = load_sweep(sweep_path(file))
    plan = plan_sweep(sweep, read_document(experiment_path(sweep.experiment)))
    console = Console()
    for point in plan.points if dry_run else ():
        console.print(shown_point(point), highlight=False, soft_wrap=True)
    longest = max(each.rounds for each in plan.experiments)
    console.print(f"{len(plan.points) or sweep.search.trials} trials of {longest} rounds", highlight=False)
    if dry_run:
        return
    tracking = Tracking(tracking_uri)
    write_sweep(plan, tracking.uri)
    _play(plan, tracking, address, console)


def resume_sweep(name: str, *, address: str | None, tracking_uri: str | None) -> None:
    """Go on with a sweep that was cut.

    Raises:
        FedloomError: there is none of that name, or something in it cannot work any more.
    """
    plan, known = read_sweep(name)
    uri = tracking_uri or known
    if uri is None:
        raise ExperimentError(
            f"sweep {name!r}: it was recorded on a server with a password, which is not written down. "
            "Give --tracking-uri."
        )
    _play(plan, Tracking(uri), address, Console())


def _play(plan: SweepPlan, tracking: Tracking, address: str | None, console: Console) -> None:
    try:
        with sigterm_interrupts():
            parent, results = run_sweep(plan, tracking, address=address, callbacks=[Teller()])
    except BaseException as error:
        error.add_note(f"go on with: {command_to_resume(plan.sweep.name, sweep=True)}")
        raise
    console.print(table_of(plan.sweep, results))
    failed = sum(result.outcome == "failed" for result in results)
    if failed:
        console.print(f"{failed} of {len(results)} trials failed", highlight=False)
    console.print(f"parent run {parent[:SHOWN_DIGITS]}")


class Teller(tune.Callback):  # type: ignore[misc, unused-ignore]
    """A line for every trial that ends."""

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Ray Tune's call for a trial that finished or was stopped."""
        self._say(result_of(trial))

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Ray Tune's call for a trial that failed once too often."""
        self._say(result_of(trial))

    @staticmethod
    def _say(done: TrialResult) -> None:
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in done.metrics.items() if name.startswith("eval/"))
        what = f"failed: {done.error}" if done.error else f"{done.outcome} after round {done.round}/{done.rounds}"
        Console().print(f"{shown_point(done.point)}: {what}  {metrics}", highlight=False, soft_wrap=True)


def table_of(sweep: Sweep, results: Sequence[TrialResult]) -> Table:
    """Return the trials in a table, the best by the first objective first; those that failed come last."""
    keys = list(sweep.space)
    table = wide_table(f"Sweep {sweep.name}")
    short = short_names(set(keys)) | {METHOD: "method"}
    for key in keys:
        table.add_column(short[key], overflow="fold")
    table.add_column("round", justify="right")
    for objective in sweep.objectives:
        table.add_column(objective.metric, justify="right", overflow="fold")
    table.add_column("outcome")
    table.add_column("run", min_width=SHOWN_DIGITS)  # whatever else is cut: it is what other commands take
    for result in best_first(sweep, results):
        table.add_row(
            *(str(result.point.get(key, "")) for key in keys),
            f"{result.round}/{result.rounds}",
            *(_number(result, objective.metric) for objective in sweep.objectives),
            result.outcome,
            result.run_id[:SHOWN_DIGITS],
        )
    return table


def _number(result: TrialResult, metric: str) -> str:
    return f"{result.metrics[metric]:.4g}" if metric in result.metrics else ""
