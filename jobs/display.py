"""What a run shows while it runs: a live bar on a terminal, a line per round elsewhere."""

import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedloom.platform.experiment import Experiment
from fedloom.platform.rounds import Round

UNITS = ("B", "kB", "MB", "GB", "TB")


def bytes_in_words(amount: float) -> str:
    """Return bytes in decimal units with three digits, e.g. ``1.23 MB``."""
    power = 0
    while amount >= 999.5 and power < len(UNITS) - 1:
        amount, power = amount / 1000, power + 1
    return f"{amount:.3g} {UNITS[power]}"


def wide_table(title: str, **options: Any) -> Table:
    """Return a table without rules between its columns: there are many, and a terminal may have 80 characters."""
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        **options,
    )


class Display:
    """The progress of one run: rounds, clients, loss, accuracy and bytes."""

    def __init__(self, title: str, experiment: Experiment, *, num_clients: int) -> None:
        """Prepare; nothing is shown before it is entered."""
        self._title = title
        self._experiment = experiment
        self._num_clients = num_clients
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._accuracy = ""

    def __enter__(self) -> Self:
        """Show the bar."""
        self._begin = time.perf_counter()
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._experiment.rounds, facts="starting")
        return self

    def show(self, done: Round, *, restored: bool = False, notes: Sequence[str] = ()) -> None:
        """Show a finished round; of those that were restored from a checkpoint only the state of the bar.

        ``notes`` are shown once, with the first round.
        """
        for note in notes if done.number == 0 else ():
            self._progress.console.print(f"{self._title}: {note}", highlight=False, soft_wrap=True)
        if "eval/accuracy" in done.metrics:
            self._accuracy = f"accuracy {done.metrics['eval/accuracy']:.1%} after {done.number}"
        facts = self._accuracy
        if done.number:
            clients = f"{int(done.metrics['updates'])}/{len(done.records)} of {self._num_clients} clients"
            loss = f"loss {done.metrics['train/loss']:.3f}"
            facts = f"{clients}  {loss}  {facts}  {bytes_in_words(done.metrics['bytes/total'])}"
        self._progress.update(self._task, completed=done.number, facts=facts)
        if restored:
            return
        if not self._console.is_terminal:
            self._console.print(
                f"{self._title}: round {done.number}/{self._experiment.rounds}  {facts}  "
                f"{time.perf_counter() - self._begin:.1f} s",
                highlight=False,
                soft_wrap=True,
            )
        answered = [f"{name} {value:.3g}" for name, value in done.metrics.items() if re.match("eval/.+/", name)]
        if answered:
            self._progress.console.print(
                f"{self._title}: round {done.number} {', '.join(answered)}", highlight=False, soft_wrap=True
            )
        for record in done.records:
            if record.refused is not None:
                self._progress.console.print(
                    f"{self._title}: round {done.number} left out client {record.client!r}: {record.refused}"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state of the bar on the terminal."""
        self._progress.stop()
