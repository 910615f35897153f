"""Commands that work on adapters outside of a run."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fedloom.jobs.app import app, explained_errors


class NumbersInARow(TyperCommand):
    """Lets ``--examples 120 80`` stand for ``--examples 120 --examples 80``, which alone the parser knows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before every number that follows its first one."""
        spelt_out: list[str] = []
        in_row = False
        for before, argument in zip(["", *args], args, strict=False):
            if in_row and before != "--examples" and re.fullmatch(r"-?\d+", argument):
                spelt_out.append("--examples")
            else:
                in_row = "--examples" in (before, argument)
            spelt_out.append(argument)
        return super().parse_args(ctx, spelt_out)


@app.command(cls=NumbersInARow)
def aggregate(  # noqa: PLR0917 - typer reads the options from the signature
    adapters: Annotated[list[Path], typer.Argument(help="Folders that PEFT saved, one for each client.")],
    method: Annotated[str, typer.Option(help="How they are merged, see `fedloom methods`.")],
    examples: Annotated[
        list[int], typer.Option(metavar="N N ...", help="How many examples each was trained on, in the same order.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for what comes of it.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method; repeatable.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank handed out. [default: all that there is]")] = None,
    per_client: Annotated[
        bool, typer.Option("--per-client", help="Write one folder for each client, at its own ranks.")
    ] = False,
) -> None:
    """Merge adapters in PEFT's format, whoever trained them, into one that PEFT loads."""
    with explained_errors():
        from fedloom.jobs.aggregate import Wanted, aggregate_folders

        wanted = Wanted(method=method, overrides=tuple(overrides or ()), rank=rank, per_client=per_client)
        done = aggregate_folders(adapters, examples, output, wanted)
        for note in done.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(done.summary)
