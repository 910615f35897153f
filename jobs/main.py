"""The command line. Heavy imports stand in the commands, so that ``fedloom --help`` answers at once."""

from typing import Annotated

import typer

from fedloom import __version__
from fedloom.jobs.app import app

# Each enters its commands; the help lists them in this order.
# isort: off
from fedloom.jobs import run_commands  # noqa: F401
from fedloom.jobs import record_commands  # noqa: F401
from fedloom.jobs import adapter_commands  # noqa: F401
from fedloom.jobs import job_commands  # noqa: F401
# isort: on

__all__ = ["app", "main"]


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


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
