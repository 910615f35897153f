"""The command line's application, what its commands share, and how errors are shown."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer

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


def check_place(executor: Where, address: str | None) -> None:
    """Refuse a cluster's address where no cluster is wanted."""
    if executor is Where.local and address is not None:
        raise typer.BadParameter("--address joins a Ray cluster; it excludes --executor local")


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Print an error of ours, or that Ctrl-C came, and what it leaves behind: no traceback for what a user can mend."""
    try:
        yield
    except FedloomError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        _show_notes(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("interrupted", err=True)
        _show_notes(interrupt)
        raise typer.Exit(INTERRUPTED) from None


def _show_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", []):
        typer.echo(note, err=True)
