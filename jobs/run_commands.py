"""Commands that play experiments: once, again, many, or not yet."""

from pathlib import Path
from typing import Annotated

import typer

from fedloom.jobs.app import (
    Address,
    ExecutorName,
    ExperimentName,
    Overrides,
    TrackingUri,
    Where,
    app,
    check_place,
    explained_errors,
)


@app.command()
def run(  # noqa: PLR0917 - typer reads the options from the signature
    experiment: ExperimentName,
    overrides: Overrides = None,
    executor: ExecutorName = Where.ray,
    address: Address = None,
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

        check_place(executor, address)
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
    executor: ExecutorName = Where.ray,
    address: Address = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Go on with a run that was cut, from its last checkpoint and in the same MLflow run."""
    with explained_errors():
        from fedloom.jobs.resume import resume_run

        check_place(executor, address)
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
    experiment: ExperimentName,
    overrides: Overrides = None,
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


@app.command()
def sweep(
    file: Annotated[str | None, typer.Argument(metavar="SWEEP", help="A YAML file.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with this sweep, which was cut.")] = None,
    address: Address = None,
    tracking_uri: TrackingUri = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, list the trials and stop.")] = False,
) -> None:
    """Run one experiment over a search space, trial beside trial, and go on with it after a cut."""
    with explained_errors():
        from fedloom.jobs.sweep import resume_sweep, start_sweep

        if (file is None) == (resume is None):
            raise typer.BadParameter("give a sweep's file, or --resume with the name of one that was started here")
        if file is not None:
            start_sweep(file, address=address, tracking_uri=tracking_uri, dry_run=dry_run)
        elif resume is not None:
            resume_sweep(resume, address=address, tracking_uri=tracking_uri)


@app.command("tune-rank")
def tune_rank(  # noqa: PLR0917 - typer reads the options from the signature
    experiment: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset, with a latency limit.")],
    overrides: Overrides = None,
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
def doctor(
    compile_parts: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile DeepSpeed's C++ part if it is not there yet.")
    ] = True,
    limit_s: Annotated[float, typer.Option("--time-limit", min=1, help="Seconds that the compiler may take.")] = 600.0,
) -> None:
    """Say what this machine offers to clients and what it lacks, and make it ready for DeepSpeed."""
    with explained_errors():
        from fedloom.jobs.doctor import examine, show

        show(examine(compile_parts=compile_parts, limit_s=limit_s))


@app.command()
def demo(tracking_uri: TrackingUri = None) -> None:
    """Run the demo: every method on the embedded model and data, and one table at the end."""
    with explained_errors():
        from fedloom.jobs.demo import run_demo

        run_demo(tracking_uri)
