"""Commands that look at what is on record, and at what comes along."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedloom.jobs.app import TrackingUri, app, explained_errors


@app.command()
def compare(  # noqa: PLR0917 - typer reads the options from the signature
    runs: Annotated[
        list[str] | None, typer.Argument(help="MLflow ids or how they begin, names of sweeps or of experiments.")
    ] = None,
    filter_string: Annotated[
        str | None, typer.Option("--filter", help="An MLflow filter, e.g. \"params.rounds = '8'\".")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report, one file that opens offline.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table of the groups in full digits.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the table of the groups for LaTeX.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Published numbers to set beside: a YAML file, or fslora, flexlora or florist.")
    ] = None,
    attach: Annotated[
        bool | None,
        typer.Option(help="Attach the report to the runs' parent. [default: if all its finished children are in]"),
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Compare recorded runs: accuracy, bytes and time over seeds, and which differences are beyond noise."""
    with explained_errors():
        from fedloom.jobs.compare import Outputs, compare_runs

        compare_runs(
            runs or [],
            filter_string=filter_string,
            reference=reference,
            outputs=Outputs(html=html, csv=csv, latex=latex),
            attach=attach,
            tracking_uri=tracking_uri,
        )


@app.command()
def evaluate(  # noqa: PLR0917 - typer reads the options from the signature
    run: Annotated[
        str, typer.Argument(help="The MLflow id of a finished run that was started here, or its beginning.")
    ],
    tasks: Annotated[list[str], typer.Option("--task", help="A task or group of lm-eval; may be repeated.")],
    include: Annotated[Path | None, typer.Option(help="A folder with more tasks, as YAML files of lm-eval.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that the model reads at once.")] = 8,
    tracking_uri: TrackingUri = None,
) -> None:
    """Evaluate a run's final adapter on tasks of the LM Evaluation Harness, for which lm-eval must be installed."""
    with explained_errors():
        from fedloom.jobs.harness import evaluate_run

        evaluate_run(
            run,
            tasks,
            include=include,
            shots=shots,
            limit=limit,
            batch_size=batch_size,
            tracking_uri=tracking_uri,
        )


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
def methods(
    name: Annotated[str | None, typer.Argument(help="A method's name, for all that there is to say of it.")] = None,
) -> None:
    """List the federated methods, or show one: paper, ranks, what goes up and down, cost, mathematics, options."""
    with explained_errors():
        from fedloom.jobs.catalogue import show

        show(name)


@app.command()
def presets() -> None:
    """List the experiments that come with Fedloom."""
    from fedloom.jobs.presets import preset_titles

    titles = preset_titles()
    width = max(map(len, titles))
    for name, title in titles.items():
        typer.echo(f"{name:{width}} {title}")
