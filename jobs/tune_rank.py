"""``fedloom tune-rank``: pilots, a table over candidate ranks, and a new experiment file with the chosen one."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_file import experiment_yaml
from fedloom.platform.preparation import Prepared
from fedloom.platform.whole_files import write_whole
from fedloom.tuning.rank_pilot import at_rank
from fedloom.tuning.structural_rank import Candidate, Weights, best, candidates_of, latency_limit_s, score_ranks


def tune_rank(
    prepared: Prepared,
    *,
    ranks: Sequence[int],
    pilot_rounds: int,
    channel_draws: int,
    weights: Weights,
    output: Path | None,
) -> Path:
    """Score the candidates, print the table, and write the experiment at the chosen rank. Returns its path.

    Raises:
        ExperimentError: a candidate cannot be had, none is feasible, or the file is there already.
    """
    experiment = prepared.experiment
    latency_limit_s(experiment)  # before a pilot is paid for
    if output is not None:
        _refuse_existing(output)
    candidates = score_ranks(
        experiment,
        prepared,
        ranks or candidates_of(experiment, prepared),
        pilot_rounds=pilot_rounds,
        channel_draws=channel_draws,
        weights=weights,
    )
    console = Console()
    console.print(_table(candidates))
    chosen = best(candidates)
    path = output or Path(f"{experiment.name}-rank-{chosen.rank}.yaml")
    _refuse_existing(path)
    title = (
        f"# Rank {chosen.rank} by fedloom tune-rank, of the candidates {', '.join(str(c.rank) for c in candidates)}\n"
    )
    write_whole(path, (title + experiment_yaml(at_rank(experiment, chosen.rank))).encode())
    console.print(f"rank {chosen.rank} has the smallest score; written to {path}", highlight=False, soft_wrap=True)
    return path


def _table(candidates: Sequence[Candidate]) -> Table:
    table = Table("rank", "energy in rank", "affordable ratio", "left out", "covariance", "score")
    for candidate in candidates:
        table.add_row(
            str(candidate.rank),
            f"{candidate.kappa:.4f}",
            f"{candidate.ratio:.3f}",
            f"{candidate.sparsification:.4f}",
            f"{candidate.covariance:.4f}",
            f"{candidate.score:.4f}" if math.isfinite(candidate.score) else "infeasible",
        )
    return table


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ExperimentError(f"--output {path}: is there already and is not overwritten. Name another file.")
    if not path.parent.is_dir():
        raise ExperimentError(f"--output {path}: there is no folder {path.parent}. Make it, or name another file.")
