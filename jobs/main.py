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
from fedloom.platform.interrupts import INTERRUPTED

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


# What several commands take.
ExperimentName = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A YAML file, or the name of a preset (see `fedloom presets`).")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
]
ExecutorName = Annotated[Where, typer.Option(help="On Ray, or in this process for debugging.")]
Address = Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; by default a SQLite file in ./fedloom-runs.")
]
JobServer = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server, e.g. http://HEAD:8265."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that `fedloom submit` printed.")]
LOCAL_JOB_SERVER = "http://127.0.0.1:8265"


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

        _check_place(executor, address)
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

        _check_place(executor, address)
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


@app.command()
def submit(  # noqa: PLR0917 - typer reads the options from the signature
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="An experiment or a sweep: a YAML file, or a preset's name.")
    ] = None,
    overrides: Overrides = None,
    address: JobServer = LOCAL_JOB_SERVER,
    folder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of the cluster in which the job runs, and keeps its runs under fedloom-runs. "
            "[default: FEDLOOM_FOLDER of the cluster's head, else the home folder there]",
        ),
    ] = None,
    upload_data: Annotated[bool, typer.Option("--upload-data", help="Send local files of data with the job.")] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI, without a password; by default the cluster's own.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with this run of that folder, in place of a FILE.")
    ] = None,
    resume_sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with this sweep of that folder, in place of a FILE.")
    ] = None,
) -> None:
    """Send an experiment or a sweep to a Ray cluster as a job, and print the job's id."""
    with explained_errors():
        if sum(given is not None for given in (file, resume, resume_sweep)) != 1:
            raise typer.BadParameter("give a FILE, or --resume RUN, or --resume-sweep NAME")
        if file is None and (overrides or upload_data):
            raise typer.BadParameter(
                "--set and --upload-data go with a FILE; what is resumed goes on as it was started"
            )
        from fedloom.jobs.submit import Target, submit_file, submit_resume

        target = Target(address=address, folder=folder, upload_data=upload_data, tracking_uri=tracking_uri)
        if file is not None:
            job = submit_file(file, overrides or [], target)
        else:
            job = submit_resume(resume or resume_sweep or "", target, sweep=resume is None)
        typer.echo(job)


@app.command()
def jobs(address: JobServer = LOCAL_JOB_SERVER) -> None:
    """List the jobs of a Ray cluster, the newest first."""
    with explained_errors():
        from fedloom.jobs.job_display import show_jobs

        show_jobs(address)


@app.command()
def status(job: JobId, address: JobServer = LOCAL_JOB_SERVER) -> None:
    """Show what a Ray cluster knows of a job."""
    with explained_errors():
        from fedloom.jobs.job_display import show_status

        show_status(address, job)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; then exit with 1 if it failed.")
    ] = False,
    address: JobServer = LOCAL_JOB_SERVER,
) -> None:
    """Print what a job has printed."""
    with explained_errors():
        from fedloom.jobs.job_display import show_logs

        show_logs(address, job, follow=follow)


@app.command()
def stop(job: JobId, address: JobServer = LOCAL_JOB_SERVER) -> None:
    """End a job as Ctrl-C would; its run can be resumed."""
    with explained_errors():
        from fedloom.jobs.job_display import stop_job

        stop_job(address, job)


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


def _check_place(executor: Where, address: str | None) -> None:
    if executor is Where.local and address is not None:
        raise typer.BadParameter("--address joins a Ray cluster; it excludes --executor local")


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
