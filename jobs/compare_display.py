"""A comparison on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedloom.jobs.display import wide_table
from fedloom.tuning.comparison.findings import megabytes, p_in_words, points
from fedloom.tuning.comparison.noise import Interval
from fedloom.tuning.comparison.report import half_width
from fedloom.tuning.comparison.summary import Comparison

MAX_SHOWN_PAIRS = 12
MIN_LABEL, MIN_ACCURACY = 12, len("76.5% ± 12.3")  # characters, however narrow the terminal


def show(comparison: Comparison, console: Console) -> None:
    """Print the table of the groups, the tests against the best of them, and what they come to."""
    parts = ((comparison.rows, _groups), (comparison.personal, _personal), (comparison.tests_of_best, _tests))
    for table in [draw(comparison) for there, draw in parts if there]:
        console.print(table)
        console.print()
    for sentence in (*comparison.findings, *comparison.notes):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _groups(comparison: Comparison) -> Table:
    clock, published = comparison.has_clock, any(row.published for row in comparison.rows)
    table = wide_table("Means over seeds, ± half of the 95% interval")
    table.add_column("group", overflow="fold", min_width=MIN_LABEL)
    clients = any(row.fairness for row in comparison.rows)
    optional = (*["sim s"] * clock, "real s", *["worst decile"] * clients)
    for column in ("seeds", "accuracy", "loss", "MB up", "MB down", *optional):
        table.add_column(column, justify="right", min_width=MIN_ACCURACY if column == "accuracy" else None)
    if published:
        table.add_column("published")
    for row in comparison.rows:
        cells = [
            escape(row.label),
            str(row.accuracy.num_seeds),
            _percent(row.accuracy),
            f"{row.loss.mean:.3f}",
            megabytes(row.group.bytes_up),
            megabytes(row.group.bytes_down),
            *([f"{row.group.sim_seconds:.1f}"] if clock and row.group.sim_seconds is not None else []),
            f"{row.group.seconds:.1f}",
            *([f"{row.fairness.worst_decile:.1%}" if row.fairness else "-"] if clients else []),
            *([escape("; ".join(entry.words for entry in row.published)) or "-"] if published else []),
        ]
        table.add_row(*cells)
    return table


def _percent(share: Interval) -> str:
    return f"{share.mean:.1%} {half_width(share, 100)}".rstrip()


def _personal(comparison: Comparison) -> Table:
    table = wide_table("Clients' own models, each on its client's examples")
    table.add_column("group", overflow="fold")
    for column in ("seeds", "accuracy of own models", "MB up", "MB down", "worst decile"):
        table.add_column(column, justify="right")
    for row in comparison.personal:
        table.add_row(
            escape(row.label),
            str(row.accuracy.num_seeds),
            _percent(row.accuracy),
            megabytes(row.group.bytes_up),
            megabytes(row.group.bytes_down),
            f"{row.worst_decile:.1%}",
        )
    return table


def _tests(comparison: Comparison) -> Table:
    shown = comparison.tests_of_best[:MAX_SHOWN_PAIRS]
    table = wide_table(
        f"Final accuracy of {escape(comparison.rows[0].label)} less that of the others",
        caption=f"p is corrected for all {len(comparison.tests)} pairs (Holm)",
    )
    table.add_column("against", overflow="fold")
    for column in ("difference", "95% interval", "seeds", "test", "p"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for test in shown:
        ends = "-" if test.low is None or test.high is None else f"{100 * test.low:+.1f} to {100 * test.high:+.1f}"
        table.add_row(
            test.second,
            points(test.difference),
            ends,
            str(test.num_seeds),
            test.test,
            p_in_words(test.p_holm),
            test.verdict,
        )
    return table
