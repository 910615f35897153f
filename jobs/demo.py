"""The demo: one experiment under every method, on the embedded model and data."""

import os
import shlex
import shutil
import sys
import time

from rich.console import Console
from rich.table import Table

from fedloom.jobs.display import bytes_in_words
from fedloom.jobs.presets import experiment_path
from fedloom.jobs.runs import execute, open_executor
from fedloom.platform.data.prepare import majority_accuracy
from fedloom.platform.experiment_file import load_experiment, with_method
from fedloom.platform.preparation import prepare
from fedloom.platform.tracking import Tracking
from fedloom.platform.tracking_calls import shown_uri
from fedloom.tuning.comparison.outcome import Outcome, outcome, verdict

BASELINE = "head_only"
METHODS = ("fedit", "fslora", "flexlora", "florist", "soft")


def run_demo(tracking_uri: str | None) -> None:
    """Run the preset ``demo`` under each method, on one set of actors, and print the table."""
    console = Console()
    begin = time.perf_counter()
    path = experiment_path("demo")
    experiment = load_experiment(path)
    console.print("Reading the standard library's documentation ...")
    prepared = prepare(experiment)
    experiment = prepared.experiment
    ranks = ", ".join(f"{profile.name} (rank {profile.rank})" for profile in experiment.population.profiles)
    console.print(
        f"{len(prepared.clients)} clients on machines of {len(experiment.population.profiles)} kinds: {ranks}. "
        f"{len(prepared.data.test)} held-out examples. Starting Ray ..."
    )
    outcomes = []
    with open_executor(experiment, prepared) as executor:
        tracking = Tracking(tracking_uri)  # while the actors load the model
        for name in (BASELINE, *METHODS):
            variant = with_method(experiment, name, {}, place=path.name)
            run_id, rounds = execute(variant, prepared, executor, tracking, tags={"demo": "true"})
            outcomes.append(outcome(name, [done.metrics for done in rounds], run_id))
    majority = majority_accuracy(prepared.data) or 0.0
    console.print(_table(outcomes))
    head_only = outcomes[0].accuracy_after
    tested = sum(len(shard) for shard in prepared.shards)
    console.print(verdict(outcomes[1:], majority=majority, head_only=head_only, test_examples=tested))
    console.print(f"{time.perf_counter() - begin:.0f} s in all. Open the runs in the MLflow UI with:")
    console.print(f"    {_ui_command(tracking_uri)}", highlight=False, soft_wrap=True)


def _ui_command(tracking_uri: str | None) -> str:
    """Return what to type in this folder: by name if that is on the path, else as this process was called."""
    program = "fedloom" if shutil.which("fedloom") else os.path.relpath(sys.argv[0])
    return shlex.join([program, "ui", *([] if tracking_uri is None else ["--tracking-uri", shown_uri(tracking_uri)])])


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("method", title="One experiment, five methods and the line they have to cross")
    for column in ("accuracy before", "accuracy after", "bytes up", "bytes down", "seconds"):
        table.add_column(column, justify="right")
    for entry in outcomes:
        table.add_row(
            entry.method,
            f"{entry.accuracy_before:.1%}",
            f"{entry.accuracy_after:.1%}",
            bytes_in_words(entry.bytes_up),
            bytes_in_words(entry.bytes_down),
            f"{entry.seconds:.1f}",
        )
    return table
