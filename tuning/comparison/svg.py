"""Pictures as SVG elements of a page, from which they take their colours, light or dark."""

import html
import io
import re
from dataclasses import dataclass
from typing import Any

from fedloom.platform.plots import COLOURS, quiet

MAX_DRAWN = 8  # groups in one picture; the best ones
INK = "#000001"  # stands for the colour of the page's own text
WIDE = 10.4  # inches of a picture that takes the page's width


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture: what it is called, what it means, and the SVG element, with a label for who cannot see it."""

    title: str
    caption: str
    svg: str


def chart(figure: Any, name: str, *, title: str, alt: str, caption: str) -> Chart:
    """Finish a figure; ``name`` differs from those of all other pictures of the page."""
    return Chart(title=title, caption=caption, svg=_svg(figure, name, alt))


def new_figure(*, width: float = 6.0, height: float = 4.2, panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure of inches and its panels, at most three in a row."""
    with quiet():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    columns = min(3, panels)
    grid = figure.subplots(-(-panels // columns), columns, squeeze=False)
    every = list(grid.flat)
    for axes in every[panels:]:
        axes.set_axis_off()
    return figure, every[:panels]


def legend(figure: Any, num_groups: int) -> None:
    """Name the groups below the picture."""
    title = None if num_groups <= MAX_DRAWN else f"the best {MAX_DRAWN} of {num_groups}"
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) <= 16 else 2 if max(map(len, labels)) <= 26 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, title=title)


def _svg(figure: Any, name: str, alt: str) -> str:
    """Return an SVG element without ids that clash, addresses, or colours of its own."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), quiet():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for place, colour in enumerate(COLOURS):
        svg = svg.replace(colour.lower(), f"var(--series-{place})")
    svg = svg.replace("#dddddd", "var(--grid)").replace(INK, "currentColor")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width} {height}"'
    return re.sub(r"<svg[^>]*", lambda _: opening, svg, count=1)
