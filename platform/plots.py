"""Curves as PNG images, without a display and without matplotlib's global state (no pyplot)."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The palette of Okabe and Ito (2008), which people with any colour vision can tell apart; its yellow is left out,
# since it is hard to see on white. Line styles and markers repeat the distinction in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_MARKERS = 20


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str) -> bytes:
    """Draw one curve per name through its (x, y) points in their order, and return a PNG image of 960 x 600 pixels.

    A legend is drawn if there are several curves. Points with NaN leave a gap.
    """
    with quiet():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=max(1, len(points) // MAX_MARKERS),
            markersize=4.5,
            linewidth=1.6,
        )
    if all(float(x).is_integer() for points in series.values() for x, _ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes, x_label=x_label, y_label=y_label)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def bars(heights: Mapping[str, float], *, x_label: str, y_label: str) -> bytes:
    """Draw one bar per name in their order, and return a PNG image of 960 x 600 pixels."""
    with quiet():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(list(heights), list(heights.values()), color=COLOURS[0])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return _png(figure)


def plain(axes: Any, *, x_label: str, y_label: str) -> None:
    """Name the axes of a plot, and leave of its frame what helps to read values."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep off the terminal what matplotlib says when it is first imported, e.g. that it looks for fonts."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
