"""The report of a comparison: one HTML file that holds everything it shows and opens without a network."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fedloom
from fedloom.platform.plots import COLOURS
from fedloom.tuning.comparison import charts
from fedloom.tuning.comparison.findings import COSTS, megabytes, p_in_words, points
from fedloom.tuning.comparison.noise import Interval
from fedloom.tuning.comparison.summary import Comparison

TEMPLATE = "report.html.j2"
# The palette again for a dark page: lighter where the first one would sink into it.
DARK_COLOURS = ("#4DB2F0", "#FF9A4D", "#2FCB9B", "#E7A3C9", "#F2B632", "#9AD4F7", "#E8E8E8")


def html_report(comparison: Comparison, *, title: str) -> bytes:
    """Return the report as HTML in UTF-8; ``title`` is plain text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    words: dict[str, Callable[..., str]] = {
        "percent": lambda value: f"{value:.1%}",
        "half_width": half_width,
        "points": points,
        "megabytes": megabytes,
        "p_value": p_in_words,
    }
    environment.filters |= words
    page = environment.get_template(TEMPLATE).render(
        title=title,
        comparison=comparison,
        costs=COSTS,
        light=COLOURS,
        dark=DARK_COLOURS,
        overview=[charts.intervals(comparison)] if comparison.rows else [],
        fronts=charts.fronts(comparison),
        curves=charts.curves(comparison),
        spectra=charts.spectra(comparison),
        clients=charts.clients(comparison),
        version=fedloom.__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return page.encode()


def half_width(interval: Interval, scale: float = 1.0, digits: int = 1) -> str:
    """Return ``± half`` of an interval, or nothing where there is none."""
    if interval.high is None:
        return ""
    return f"± {scale * (interval.high - interval.mean):.{digits}f}"
