"""The groups of a comparison as a table for other programs: CSV in full digits, LaTeX rounded."""

import math
from typing import Any

from fedloom.tuning.comparison.summary import Comparison, Row


def csv_table(comparison: Comparison) -> bytes:
    """Return a row for each group, every figure in full; what is not known is empty."""
    text: str = _frame([_figures(row) for row in comparison.rows]).to_csv(index=False, lineterminator="\n")
    return text.encode()


def latex_table(comparison: Comparison) -> bytes:
    """Return a ``table`` for the package booktabs: group, seeds, accuracy, loss, traffic, time, worst decile."""
    columns = ["group", "seeds", "accuracy (%)", "loss", "MB up", "MB down", "time (s)", "worst decile (%)"]
    time = "simulated" if comparison.has_clock else "real"
    rows = [_printed(row, simulated=comparison.has_clock) for row in comparison.rows]
    published = any(row.published for row in comparison.rows)
    frame = _frame(
        [dict(zip([*columns, "published"], cells, strict=True)) for cells in rows],
        columns=[*columns, "published"] if published else columns,
    )
    caption = rf"Means over seeds, with 95\% intervals by Student's t where there are several seeds; {time} time."
    body = frame.to_latex(
        index=False,
        escape=True,
        caption=caption,
        label="tab:comparison",
        column_format="l" + "r" * (frame.shape[1] - 1),
    )
    return str(body).replace("±", r"$\pm$").encode()


def _frame(rows: list[dict[str, Any]], columns: list[str] | None = None) -> Any:
    import pandas

    return pandas.DataFrame(rows, columns=columns)


def _figures(row: Row) -> dict[str, Any]:
    fairness, spectrum = row.fairness, row.spectrum
    measured = {
        "group": row.label,
        "num_seeds": row.accuracy.num_seeds,
        "seeds": " ".join(map(str, row.group.seeds)),
        "accuracy": row.accuracy.mean,
        "accuracy_low": row.accuracy.low,
        "accuracy_high": row.accuracy.high,
        "loss": row.loss.mean,
        "loss_low": row.loss.low,
        "loss_high": row.loss.high,
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "bytes_total": row.group.bytes_total,
        "sim_seconds": row.group.sim_seconds,
        "seconds": row.group.seconds,
        "fronts": " ".join(row.fronts),
        "clients_mean": fairness and fairness.mean,
        "clients_std": fairness and fairness.std,
        "clients_worst_decile": fairness and fairness.worst_decile,
        "rank": spectrum and spectrum.rank,
        "stable_rank": spectrum and spectrum.stable_rank,
        "run_ids": " ".join(run.run_id for run in row.group.runs),
    }
    return measured | {
        "published": "; ".join(f"{entry.metric}={entry.value:g} ({entry.source})" for entry in row.published)
    }


def _printed(row: Row, *, simulated: bool) -> list[str]:
    time = row.group.sim_seconds if simulated else row.group.seconds
    return [
        row.label,
        str(row.accuracy.num_seeds),
        _with_half_width(100 * row.accuracy.mean, row.accuracy.high and 100 * row.accuracy.high, digits=1),
        _with_half_width(row.loss.mean, row.loss.high, digits=3),
        f"{row.bytes_up / 1e6:.3g}",
        f"{row.bytes_down / 1e6:.3g}",
        "" if time is None else f"{time:.4g}",
        "" if row.fairness is None else f"{100 * row.fairness.worst_decile:.1f}",
        "; ".join(entry.words for entry in row.published),
    ]


def _with_half_width(mean: float, high: float | None, *, digits: int) -> str:
    if high is None or math.isnan(high):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {high - mean:.{digits}f}"
