"""The pictures of a report: accuracy, fronts, curves, spectra and clients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from fedloom.platform.plots import COLOURS, MARKERS, MAX_MARKERS, STYLES, plain
from fedloom.tuning.comparison.groups import Group
from fedloom.tuning.comparison.noise import interval_of
from fedloom.tuning.comparison.runs import Point
from fedloom.tuning.comparison.summary import Comparison, Row
from fedloom.tuning.comparison.svg import INK, MAX_DRAWN, WIDE, Chart, chart, legend, new_figure

MEGABYTE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Something that is paid for accuracy, as an axis."""

    name: str
    label: str
    of_point: Callable[[Point], float | None]
    of_group: Callable[[Group], float | None] | None


COSTS = (
    Cost(name="rounds", label="round", of_point=lambda point: float(point.round), of_group=None),
    Cost(
        name="bytes",
        label="megabytes sent, both ways",
        of_point=lambda point: point.bytes_total / MEGABYTE,
        of_group=lambda group: group.bytes_total / MEGABYTE,
    ),
    Cost(
        name="simulated time",
        label="simulated seconds",
        of_point=lambda point: point.sim_seconds,
        of_group=lambda group: group.sim_seconds,
    ),
    Cost(name="real time", label="real seconds", of_point=lambda point: None, of_group=lambda group: group.seconds),
)


def intervals(comparison: Comparison) -> Chart:
    """Every seed of every group as a dot, and the mean with its interval."""
    rows = comparison.rows
    figure, (axes,) = new_figure(width=WIDE, height=0.9 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        colour = COLOURS[place % len(COLOURS)] if place < MAX_DRAWN else INK
        axes.plot(
            list(row.group.accuracies.values()), [place] * len(row.group.runs), "o", color=colour, alpha=0.45, ms=5
        )
        mean, low, high = row.accuracy.mean, row.accuracy.low, row.accuracy.high
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([mean], [place], "D", color=colour, ms=6.5)
    axes.set_yticks(range(len(rows)), [_short(row.label, place) for place, row in enumerate(rows)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plain(axes, x_label="final accuracy on the held-out examples", y_label="")
    return chart(
        figure,
        "intervals",
        title="Final accuracy",
        alt="Final accuracy by group, from the highest mean down: "
        + "; ".join(f"{row.label} {row.accuracy.mean:.1%}" for row in rows),
        caption="Diamond: mean over seeds. Bar: its 95% interval by Student's t. Dots: single seeds.",
    )


def fronts(comparison: Comparison) -> list[Chart]:
    """Mean accuracy against each cost, with the Pareto front as a line; nothing for a single group."""
    if len(comparison.rows) < 2:
        return []
    return [drawn for cost in COSTS if cost.of_group is not None and (drawn := _front(comparison, cost, cost.of_group))]


def _front(comparison: Comparison, cost: Cost, of_group: Callable[[Group], float | None]) -> Chart | None:
    costs = [of_group(row.group) for row in comparison.rows]
    known = [value for value in costs if value is not None]
    if len(known) < len(costs) or not any(known):
        return None
    key = {"bytes": "bytes", "simulated time": "sim_seconds", "real time": "seconds"}[cost.name]
    name = f"front-{key}"
    figure, (axes,) = new_figure()
    front = sorted((x, row.accuracy.mean) for x, row in zip(known, comparison.rows, strict=True) if key in row.fronts)
    axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1.1, linestyle="--", alpha=0.6)
    for place, (x, row) in enumerate(zip(known, comparison.rows, strict=True)):
        on, drawn = key in row.fronts, place < MAX_DRAWN
        colour = COLOURS[place % len(COLOURS)] if drawn else INK
        error = 0.0 if row.accuracy.high is None else row.accuracy.high - row.accuracy.mean
        axes.errorbar([x], [row.accuracy.mean], yerr=[error] if error else None, color=colour, linewidth=1.1, alpha=0.5)
        face = colour if on else "none"
        marker = MARKERS[place % len(MARKERS)] if drawn else "."
        axes.plot([x], [row.accuracy.mean], marker, ms=8, mfc=face, mec=colour, mew=1.6, linestyle="none",
                  label=_short(row.label, place) if drawn else None)  # fmt: skip
    plain(axes, x_label=f"{cost.label}, mean over seeds", y_label="mean final accuracy")
    legend(figure, len(comparison.rows))
    labels = [row.label for row in comparison.rows if key in row.fronts]
    return chart(
        figure,
        name,
        title=f"Accuracy against {cost.name}",
        alt=f"Mean final accuracy against {cost.label}. On the Pareto front: {'; '.join(labels)}.",
        caption="Filled: on the Pareto front of the means, which the dashed line joins. Hollow: another group costs no "
        "more and reaches no less. Thin bars: 95% intervals.",
    )


def curves(comparison: Comparison) -> list[Chart]:
    """Accuracy over rounds, bytes and simulated seconds: means over seeds, with the span of the seeds."""
    return [drawn for cost in COSTS if (drawn := _curve(comparison.rows[:MAX_DRAWN], cost, len(comparison.rows)))]


def _curve(rows: Sequence[Row], cost: Cost, num_groups: int) -> Chart | None:
    name = f"curve-{cost.name.replace(' ', '-')}"
    figure, (axes,) = new_figure()
    drawn = []
    for place, row in enumerate(rows):
        line = _mean_curve(row.group, cost)
        if line is None:
            continue
        x, y, low, high = line
        drawn.append(row.label)
        colour = COLOURS[place % len(COLOURS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, y, color=colour, linestyle=STYLES[place // len(COLOURS) % len(STYLES)], linewidth=1.7,
                  marker=MARKERS[place % len(MARKERS)], ms=4.5, markevery=max(1, len(x) // MAX_MARKERS),
                  label=_short(row.label, place))  # fmt: skip
    if not drawn:
        return None
    if cost.name == "rounds":
        axes.xaxis.get_major_locator().set_params(integer=True)
    plain(axes, x_label=cost.label, y_label="accuracy")
    legend(figure, num_groups)
    return chart(
        figure,
        name,
        title=f"Accuracy over {cost.name}",
        alt=f"Accuracy of the global model over {cost.name} for {'; '.join(drawn)}.",
        caption="Line: mean over seeds at each evaluated round, drawn at the mean cost until then. "
        "Shade: from the worst to the best seed.",
    )


def _mean_curve(group: Group, cost: Cost) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Return x, mean, lowest and highest accuracy over the rounds that all seeds have evaluated."""
    by_round = [{point.round: point for point in run.points} for run in group.runs]
    shared = sorted(set.intersection(*(set(points) for points in by_round)))
    spent = [[cost.of_point(points[number]) for points in by_round] for number in shared]
    if not shared or any(value is None for values in spent for value in values) or not any(map(any, spent)):
        return None
    gained = [[points[number].accuracy for points in by_round] for number in shared]
    x = [fmean(value for value in values if value is not None) for values in spent]
    return (
        x,
        [interval_of(each).mean for each in gained],
        [min(each) for each in gained],
        [max(each) for each in gained],
    )


def spectra(comparison: Comparison) -> Chart | None:
    """The singular values of every module's update, a panel for each group."""
    best = enumerate(comparison.rows[:MAX_DRAWN])
    rows = [(place, row) for place, row in best if row.spectrum is not None and row.spectrum.rank > 0]
    if not rows:
        return None
    figure, panels = new_figure(width=WIDE, height=2.5 * -(-len(rows) // 3), panels=len(rows))
    kinds = sorted({_kind(module) for _, row in rows for run in row.group.runs for module in run.spectra})
    for (place, row), axes in zip(rows, panels, strict=True):
        for run in row.group.runs:
            for module, sigma in run.spectra.items():
                kind = kinds.index(_kind(module))
                axes.semilogy(range(1, len(sigma) + 1), sigma, color=COLOURS[kind % len(COLOURS)], alpha=0.45,
                              linestyle=STYLES[kind // len(COLOURS) % len(STYLES)], linewidth=1.0)  # fmt: skip
        plain(axes, x_label="index", y_label="singular value")
        axes.set_title(_short(row.label, place), fontsize=9)
    for kind, name in enumerate(kinds):
        panels[0].plot([], [], color=COLOURS[kind % len(COLOURS)], label=name)
    panels[0].legend(frameon=False, fontsize=8)
    return chart(
        figure,
        "spectra",
        title="Rank spectra",
        alt="Singular values of the final global adapter by module. "
        + "; ".join(f"{row.label}: mean stable rank {row.spectrum.stable_rank:.1f}" for _, row in rows if row.spectrum),
        caption="One line for each module and seed: the singular values of scale · B A, largest first, on a "
        "logarithmic axis; those below rounding are left out.",
    )


def clients(comparison: Comparison) -> Chart | None:
    """Accuracy over clients, from the worst to the best, all seeds together."""
    rows = [(place, row) for place, row in enumerate(comparison.rows[:MAX_DRAWN]) if row.fairness is not None]
    if not rows:
        return None
    figure, (axes,) = new_figure(width=WIDE)
    for place, row in rows:
        own = np.sort([score.accuracy for run in row.group.runs for score in run.clients])
        share = np.arange(1, len(own) + 1) / len(own)
        axes.plot(share, own, color=COLOURS[place % len(COLOURS)], linewidth=1.7, label=_short(row.label, place),
                  marker=MARKERS[place % len(MARKERS)], ms=4.5, markevery=max(1, len(own) // 10))  # fmt: skip
    plain(axes, x_label="share of the clients, worst first", y_label="accuracy on own examples")
    legend(figure, len(comparison.rows))
    return chart(
        figure,
        "clients",
        title="Accuracy over clients",
        alt="Sorted accuracies of the clients. "
        + "; ".join(f"{row.label}: worst tenth {row.fairness.worst_decile:.1%}" for _, row in rows if row.fairness),
        caption="Clients of all seeds together, each on its own examples; a flat line treats clients alike.",
    )


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _short(label: str, place: int) -> str:
    """Return a label that fits into a picture; one that was cut bears the number of its row in the table."""
    return label if len(label) <= 44 else f"{place + 1}: {label[:16]}…{label[-24:]}"
