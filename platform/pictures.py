"""The pictures of one run: what was reached against what it cost, and how the rounds went."""

from collections import Counter
from collections.abc import Mapping, Sequence

from fedloom.platform.evaluation import ClientScore
from fedloom.platform.plots import bars, curves
from fedloom.platform.record import Record

Rounds = Sequence[tuple[int, Mapping[str, float], Sequence[Record]]]
Points = list[tuple[float, float]]

COSTS = {  # file name: (metric, divisor, label); rounds have no metric of their own
    "round": ("", 1.0, "round"),
    "bytes": ("bytes/total", 1e6, "megabytes sent so far"),
    "sim_seconds": ("sim/seconds", 1.0, "simulated seconds"),
}
PER_ROUND = {  # file name: (metrics, label)
    "latency_by_round": (("sim/download_s", "sim/compute_s", "sim/upload_s", "sim/wait_s"), "simulated seconds"),
    "ratio_by_round": (("ratio/mean", "ratio/min"), "share of the global rank"),
    "queue_by_round": (("controller/queue_s",), "simulated seconds"),
}


def pictures(rounds: Rounds) -> dict[str, bytes]:
    """Return PNG images by file name; what a run has no points for is left out.

    Args:
        rounds: number, metrics and client records of each round, round 0 first.
    """
    images = {}
    for metric in ("eval/accuracy", "eval/loss"):
        for name, (cost, divisor, label) in COSTS.items():
            points = _against(rounds, metric, cost, divisor)
            if points:
                file = f"{metric.removeprefix('eval/')}_by_{name}.png"
                images[file] = curves({metric: points}, x_label=label, y_label=metric)
    for file, (metrics, label) in PER_ROUND.items():
        series = {name: _by_round(rounds, name) for name in metrics}
        series = {name: points for name, points in series.items() if points}
        if series:
            images[f"{file}.png"] = curves(series, x_label="round", y_label=label)
    ranks = Counter(record.rank for _, _, records in rounds for record in records)
    if ranks:
        counts = {f"{rank:g}": float(ranks[rank]) for rank in sorted(ranks)}
        images["ranks.png"] = bars(counts, x_label="rank that a client trained", y_label="clients, over all rounds")
    return images


def client_accuracy(scores: Sequence[ClientScore]) -> bytes:
    """Return a PNG image: the accuracies of each profile's clients, from the worst to the best."""
    series: dict[str, Points] = {}
    for profile in sorted({each.profile for each in scores}):
        own = sorted(each.accuracy for each in scores if each.profile == profile)
        series[profile] = [((place + 1) / len(own), accuracy) for place, accuracy in enumerate(own)]
    return curves(series, x_label="share of the profile's clients, worst first", y_label="accuracy on own examples")


def _against(rounds: Rounds, metric: str, cost: str, divisor: float) -> Points:
    """Return the metric against what was spent until then; nothing if nothing was."""
    points: Points = []
    spent = 0.0
    for number, metrics, _ in rounds:
        spent = metrics.get(cost, spent) if cost else float(number)
        if metric in metrics:
            points.append((spent / divisor, metrics[metric]))
    return points if spent or not cost else []


def _by_round(rounds: Rounds, metric: str) -> Points:
    return [(float(number), metrics[metric]) for number, metrics, _ in rounds if metric in metrics]
