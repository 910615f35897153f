"""Commands that speak to a cluster's job server."""

from typing import Annotated

import typer

from fedloom.jobs.app import LOCAL_JOB_SERVER, JobId, JobServer, Overrides, app, explained_errors


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
        str | None, typer.Option(metavar="RUN", help="Go on with this run of that folder, or with what this job did.")
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
