"""The groups of a comparison as a table for other programs: CSV in full digits, LaTeX rounded."""

import math
from typing import Any

from fedloom.tuning.comparison.findings import megabytes
from fedloom.tuning.comparison.groups import Group
from fedloom.tuning.comparison.noise import Interval
from fedloom.tuning.comparison.summary import Comparison, PersonalRow, Row


def csv_table(comparison: Comparison) -> bytes:
    """Return a row for each group, every figure in full; what is not known is empty.

    Accuracies of clients' own models are in columns of their own, ``personal_...``.
    """
    rows = [*map(_figures, comparison.rows), *map(_personal_figures, comparison.personal)]
    text: str = _frame(rows, columns=list(dict.fromkeys(name for row in rows for name in row))).to_csv(
        index=False, lineterminator="\n"
    )
    return text.encode()


def latex_table(comparison: Comparison) -> bytes:
    """Return a ``table`` for the package booktabs: group, seeds, accuracy, loss, traffic, time, worst decile.

    Groups in which every client has a model of its own are in a second table.
    """
    columns = ["group", "seeds", "accuracy (%)", "loss", "MB up", "MB down", "time (s)", "worst decile (%)"]
    time = "simulated" if comparison.has_clock else "real"
    if any(row.published for row in comparison.rows):
        columns.append("published")
    rows = [_printed(row, simulated=comparison.has_clock)[: len(columns)] for row in comparison.rows]
    over_seeds = r"Means over seeds, with 95\% intervals by Student's t where there are several seeds"
    text = _latex(columns, rows, caption=f"{over_seeds}; {time} time.", label="tab:comparison")
    columns = ["group", "seeds", "accuracy of own models (%)", "MB up", "MB down", "worst decile (%)"]
    rows = [_personal_printed(row) for row in comparison.personal]
    text += _latex(
        columns,
        rows,
        caption=f"Clients' own models, each on its client's examples. {over_seeds}.",
        label="tab:personal",
    )
    return text.encode()


def _latex(columns: list[str], rows: list[list[str]], *, caption: str, label: str) -> str:
    """Return a table, or nothing if it has no row."""
    if not rows:
        return ""
    frame = _frame([dict(zip(columns, cells, strict=True)) for cells in rows], columns=columns)
    layout = "l" + "r" * (len(columns) - 1)
    body = frame.to_latex(index=False, escape=True, caption=caption, label=label, column_format=layout)
    return str(body).replace("±", r"$\pm$")


def _frame(rows: list[dict[str, Any]], *, columns: list[str]) -> Any:
    import pandas

    return pandas.DataFrame(rows, columns=columns)


def _figures(row: Row) -> dict[str, Any]:
    fairness, spectrum = row.fairness, row.spectrum
    return {
        **_of_group(row.group),
        "accuracy": row.accuracy.mean,
        "accuracy_low": row.accuracy.low,
        "accuracy_high": row.accuracy.high,
        "loss": row.loss.mean,
        "loss_low": row.loss.low,
        "loss_high": row.loss.high,
        "fronts": " ".join(row.fronts),
        "clients_mean": fairness and fairness.mean,
        "clients_std": fairness and fairness.std,
        "clients_worst_decile": fairness and fairness.worst_decile,
        "rank": spectrum and spectrum.rank,
        "stable_rank": spectrum and spectrum.stable_rank,
        "published": "; ".join(f"{entry.metric}={entry.value:g} ({entry.source})" for entry in row.published),
    }


def _personal_figures(row: PersonalRow) -> dict[str, Any]:
    return {
        **_of_group(row.group),
        "personal_accuracy": row.accuracy.mean,
        "personal_accuracy_low": row.accuracy.low,
        "personal_accuracy_high": row.accuracy.high,
        "personal_std": row.std,
        "personal_worst_decile": row.worst_decile,
    }


def _of_group(group: Group) -> dict[str, Any]:
    return {
        "group": group.label,
        "num_seeds": len(group.runs),
        "seeds": " ".join(map(str, group.seeds)),
        "bytes_up": group.bytes_up,
        "bytes_down": group.bytes_down,
        "bytes_total": group.bytes_total,
        "sim_seconds": group.sim_seconds,
        "seconds": group.seconds,
        "run_ids": " ".join(run.run_id for run in group.runs),
    }


def _printed(row: Row, *, simulated: bool) -> list[str]:
    time = row.group.sim_seconds if simulated else row.group.seconds
    return [
        row.label,
        str(row.accuracy.num_seeds),
        _percent(row.accuracy),
        _with_half_width(row.loss.mean, row.loss.high, digits=3),
        megabytes(row.group.bytes_up),
        megabytes(row.group.bytes_down),
        "" if time is None else f"{time:.4g}",
        "" if row.fairness is None else f"{100 * row.fairness.worst_decile:.1f}",
        "; ".join(entry.words for entry in row.published),
    ]


def _personal_printed(row: PersonalRow) -> list[str]:
    return [
        row.label,
        str(row.accuracy.num_seeds),
        _percent(row.accuracy),
        megabytes(row.group.bytes_up),
        megabytes(row.group.bytes_down),
        f"{100 * row.worst_decile:.1f}",
    ]


def _percent(share: Interval) -> str:
    return _with_half_width(100 * share.mean, share.high and 100 * share.high, digits=1)


def _with_half_width(mean: float, high: float | None, *, digits: int) -> str:
    if high is None or math.isnan(high):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {high - mean:.{digits}f}"
