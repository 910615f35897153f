"""The command line. Heavy imports stand in the commands, so that ``fedloom --help`` answers at once."""

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom import __version__
from fedloom.platform.errors import FedloomError

INTERRUPTED = 130
app = typer.Typer(
    name="fedloom",
    help="Federated LoRA fine-tuning over unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Where(StrEnum):
    """Where server and clients live."""

    ray = "ray"
    local = "local"


TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; by default a SQLite file in ./fedloom-runs.")
]


@app.command()
def run(  # noqa: PLR0917 - typer reads the options from the signature
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset (see `fedloom presets`).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    executor: Annotated[Where, typer.Option(help="On Ray, or in this process for debugging.")] = Where.ray,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    tracking_uri: TrackingUri = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the resolved experiment and stop.")] = False,
) -> None:
    """Run one experiment to its last round."""
    with explained_errors():
        from fedloom.jobs.presets import experiment_path
        from fedloom.jobs.runs import execute, open_executor
        from fedloom.platform.experiment_file import experiment_yaml, load_experiment
        from fedloom.platform.preparation import prepare
        from fedloom.platform.tracking import Tracking

        if executor is Where.local and address is not None:
            raise typer.BadParameter("--address joins a Ray cluster; it excludes --executor local")
        prepared = prepare(load_experiment(experiment_path(experiment), overrides or []))
        resolved = prepared.experiment
        if dry_run:
            typer.echo(experiment_yaml(resolved), nl=False)
            return
        with open_executor(resolved, prepared, local=executor is Where.local, address=address) as place:
            tracking = Tracking(tracking_uri)  # while the actors load the model
            execute(resolved, prepared, place, tracking)


@app.command()
def resume(  # noqa: PLR0917 - typer reads the options from the signature
    run: Annotated[str, typer.Argument(help="The MLflow id of a run that was started here, or how it begins.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; needs --allow-changes.")
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on although the experiment or its data have changed.")
    ] = False,
    executor: Annotated[Where, typer.Option(help="On Ray, or in this process for debugging.")] = Where.ray,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Go on with a run that was cut, from its last checkpoint and in the same MLflow run."""
    with explained_errors():
        from fedloom.jobs.resume import resume_run

        if executor is Where.local and address is not None:
            raise typer.BadParameter("--address joins a Ray cluster; it excludes --executor local")
        resume_run(
            run,
            overrides or [],
            allow_changes=allow_changes,
            local=executor is Where.local,
            address=address,
            tracking_uri=tracking_uri,
        )


@app.command()
def plan(
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset (see `fedloom presets`).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Plan for this Ray cluster instead of this machine.")] = None,
    probe: Annotated[bool, typer.Option(help="Train one client of every profile to estimate real time.")] = True,
) -> None:
    """Predict bytes, operations, memory and time before anything is paid."""
    with explained_errors():
        from fedloom.jobs.plan import show_plan
        from fedloom.jobs.presets import experiment_path
        from fedloom.platform.experiment_file import load_experiment
        from fedloom.platform.preparation import prepare

        prepared = prepare(load_experiment(experiment_path(experiment), overrides or []))
        show_plan(prepared, address=address, measure=probe)


@app.command("tune-rank")
def tune_rank(  # noqa: PLR0917 - typer reads the options from the signature
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset, with a latency limit.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", help="A candidate; may be repeated. By default powers of two.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The new experiment file; by default NAME-rank-R.yaml.")] = None,
    pilot_rounds: Annotated[int, typer.Option(min=1, help="Rounds of the pilot of each candidate.")] = 2,
    channel_draws: Annotated[int, typer.Option(min=1, help="Cohorts and channels that are averaged over.")] = 100,
    approximation: Annotated[float, typer.Option(min=0, help="a0: weight of what a rank cannot hold.")] = 1.0,
    sparsification: Annotated[float, typer.Option(min=0, help="a1: weight of what is not sent.")] = 1.0,
    covariance: Annotated[float, typer.Option(min=0, help="a2: weight of averaging factors apart.")] = 1.0,
) -> None:
    """Choose the rank for a latency limit by short pilots, and write a new experiment file (TSFA's first stage)."""
    with explained_errors():
        from fedloom.jobs.presets import experiment_path
        from fedloom.jobs.tune_rank import tune_rank as tune
        from fedloom.platform.experiment_file import load_experiment
        from fedloom.platform.preparation import prepare
        from fedloom.tuning.structural_rank import Weights

        tune(
            prepare(load_experiment(experiment_path(experiment), overrides or [])),
            ranks=ranks or [],
            pilot_rounds=pilot_rounds,
            channel_draws=channel_draws,
            weights=Weights(approximation=approximation, sparsification=sparsification, covariance=covariance),
            output=output,
        )


@app.command()
def demo(tracking_uri: TrackingUri = None) -> None:
    """Run the demo: every method on the embedded model and data, and one table at the end."""
    with explained_errors():
        from fedloom.jobs.demo import run_demo

        run_demo(tracking_uri)


@app.command()
def ui(
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the runs in the MLflow UI, on this machine only."""
    with explained_errors():
        from fedloom.platform.tracking import ensure_store, ui_command
        from fedloom.platform.tracking import tracking_uri as resolved_uri

        uri = resolved_uri(tracking_uri)
        ensure_store(uri)
        command, variables = ui_command(uri, port)
        sys.stdout.flush()
        os.execve(command[0], command, os.environ | variables)


@app.command()
def methods() -> None:
    """List the federated methods."""
    from rich.console import Console
    from rich.table import Table

    from fedloom.platform.registry import method_class, method_names, option_names

    table = Table("name", "method", "paper", "unequal ranks", "options")
    for name in method_names():
        traits = method_class(name).traits
        unequal = "yes" if traits.heterogeneous else "no"
        table.add_row(name, traits.title, traits.paper, unequal, ", ".join(option_names(name)))
    Console().print(table)


@app.command()
def presets() -> None:
    """List the experiments that come with Fedloom."""
    from fedloom.jobs.presets import preset_titles

    for name, title in preset_titles().items():
        typer.echo(f"{name:24} {title}")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Print an error of ours as one line, and end Ctrl-C in silence: no traceback for what a user can mend."""
    try:
        yield
    except FedloomError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        _show_notes(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("interrupted: the MLflow run is marked KILLED", err=True)
        _show_notes(interrupt)
        raise typer.Exit(INTERRUPTED) from None


def _show_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", []):
        typer.echo(note, err=True)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
