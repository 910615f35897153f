"""TSFA, offline stage: the structural rank, before an experiment, from pilots and the channel's statistics.

Kim and Choi, Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates, arXiv:2505.00333.
RECONSTRUCTED: only the abstracts were at hand. They say that a first, offline stage chooses the rank, and that the
convergence bound shows the effects of the rank, of the sparsification and of the covariance of factors that are
averaged apart. The score below is ours, consistent with that. For every candidate r,

    Gamma(r) = a0 / kappa(r) + a1 eps(r, rho(r)) + a2 cov(r)

    kappa(r)    share of the energy of the local products that rank r can hold: sum_{i<=r} g_i^2 / sum_i g_i^2
    eps(r, rho) share that is left out when floor(rho r) ranks are sent: sum_{rho r < i <= r} g_i^2 / sum_i g_i^2
    cov(r)      ||sum_k w_k B_k A_k - B A||_F^2 / ||sum_k w_k B_k A_k||_F^2, B and A the means

g_i^2 come from a pilot at the largest candidate, cov(r) from a pilot at r. rho(r) is the ratio at which a round takes
the latency limit if everybody sends the same share: of a shared band, the common ratio at which all finish at the limit
together, its mean over draws of cohort and channel; of links of their own, the mean over clients too. A candidate is
infeasible if a client cannot even train within the limit, in the mean, or if rho(r) r < 1. The smallest Gamma wins; of
equals the smaller rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.methods.controllers import ROUNDING
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.preparation import Prepared, world_of
from fedloom.platform.world.controller import Conditions
from fedloom.platform.world.rates import bandwidth_for
from fedloom.tuning.rank_pilot import at_rank, mean_spectrum, pilot, relative_covariance

HALVINGS = 60  # of a bracket of the ratio: to the last digit of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """a0, a1 and a2 of the score."""

    approximation: float = 1.0
    sparsification: float = 1.0
    covariance: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A candidate rank and its three terms.

    Attributes:
        rank: r.
        kappa: share of the energy that rank r can hold.
        ratio: rho(r), what the limit affords, at most 1; below 1 / r where nothing does.
        sparsification: eps(r, rho(r)).
        covariance: cov(r).
        score: Gamma(r); infinite if infeasible.
    """

    rank: int
    kappa: float
    ratio: float
    sparsification: float
    covariance: float
    score: float


def candidates_of(experiment: Experiment, prepared: Prepared) -> list[int]:
    """Return the default candidates: powers of two up to the rank that every machine bears."""
    most = largest_candidate(experiment, prepared)
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def largest_candidate(experiment: Experiment, prepared: Prepared) -> int:
    """Return the largest rank that every machine bears and every target module allows."""
    machines = min(rank for profile in experiment.population.profiles for rank in profile.ranks)
    return min(machines, *(min(shape) for shape in prepared.shapes.values()))


def latency_limit_s(experiment: Experiment) -> float:
    """Return the limit on the mean latency of a round.

    Raises:
        ExperimentError: the experiment has none.
    """
    limit = experiment.controller.options.get("latency_limit_s")
    if limit is None:
        raise ExperimentError(
            f"key controller: the rank is chosen for a limit on the mean latency, and the controller "
            f"{experiment.controller.name!r} has none. Set controller.name: tsfa and controller.latency_limit_s."
        )
    return float(limit)


def score_ranks(
    experiment: Experiment,
    prepared: Prepared,
    ranks: Sequence[int],
    *,
    pilot_rounds: int,
    channel_draws: int,
    weights: Weights,
) -> list[Candidate]:
    """Run the pilots and score the candidates, in ascending order of rank.

    Args:
        experiment: with a limit on the latency.
        prepared: its data, clients and shapes.
        ranks: the candidates.
        pilot_rounds: rounds of each pilot.
        channel_draws: cohorts and channels over which ratios are averaged.
        weights: of the score.

    Raises:
        ExperimentError: a candidate is not between 1 and what every machine bears, or there is no latency limit.
    """
    _check(ranks, largest_candidate(experiment, prepared))
    limit_s = latency_limit_s(experiment)
    cohorts = {rank: pilot(prepared, experiment, rank, rounds=pilot_rounds) for rank in sorted(set(ranks))}
    spectrum = mean_spectrum(cohorts[max(ranks)], max(ranks))
    return [
        candidate_of(
            rank,
            spectrum,
            ratio=affordable_ratio(experiment, prepared, rank, limit_s, channel_draws),
            covariance=relative_covariance(cohort),
            weights=weights,
        )
        for rank, cohort in cohorts.items()
    ]


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the feasible candidate with the smallest score; of equals that of the smaller rank.

    Raises:
        ExperimentError: none is feasible.
    """
    chosen = min(candidates, key=lambda candidate: (candidate.score, candidate.rank))
    if np.isfinite(chosen.score):
        return chosen
    raise ExperimentError(
        "key controller.latency_limit_s: no candidate rank can send even one rank within the limit. "
        "Raise the limit, the band or the links, or train fewer steps."
    )


def candidate_of(rank: int, spectrum: Tensor, *, ratio: float, covariance: float, weights: Weights) -> Candidate:
    """Put the terms of a candidate together; ``spectrum`` has the energy of each direction, descending."""
    energy = spectrum.double().numpy()
    total = energy.sum() or 1.0
    # A pilot that has not moved has no energy: then nothing is lost by any rank.
    kappa = float(energy[:rank].sum() / total) if energy.any() else 1.0
    ratio = min(1.0, ratio)
    kept = int(ratio * rank + ROUNDING)
    left_out = float(energy[kept:rank].sum() / total)
    score = weights.approximation / kappa + weights.sparsification * left_out + weights.covariance * covariance
    return Candidate(
        rank=rank,
        kappa=kappa,
        ratio=ratio,
        sparsification=left_out,
        covariance=covariance,
        score=score if kept >= 1 and kappa > 0 else float("inf"),
    )


def affordable_ratio(experiment: Experiment, prepared: Prepared, rank: int, limit_s: float, draws: int) -> float:
    """Return rho(r): the mean over draws of cohort and channel of the ratio at which a round takes the limit.

    A draw in which a client cannot even train within the limit counts as 0.
    """
    described = at_rank(experiment, rank)
    world = world_of(described, prepared)
    ratios = [
        common_ratio(conditions, limit_s)
        for conditions in (world.conditions(number) for number in range(1, draws + 1))
        if conditions is not None
    ]
    return float(np.mean(ratios)) if ratios else 0.0


def common_ratio(conditions: Conditions, limit_s: float) -> float:
    """Return the ratio with which everybody finishes at the limit, not cut at 1 and never below 0.

    Of a shared band it is common to all clients, and the band is used up; of links of their own it is the mean.
    Where time costs nothing it is infinite.
    """
    channel = conditions.channel
    slack_s = limit_s - conditions.before_upload_s - channel.delay_up_s
    if (slack_s <= 0).any():
        return 0.0
    snr_hz, band_hz = channel.snr_hz, channel.bandwidth_hz
    if snr_hz is None or band_hz is None:
        bits = np.where(np.isfinite(channel.uplink_bit_per_s), slack_s * channel.uplink_bit_per_s, np.inf)
        return float(np.maximum(0.0, (bits - conditions.fixed_bits) / conditions.factor_bits).mean())

    def needed_hz(ratio: float) -> float:
        rates: NDArray[np.float64] = (conditions.fixed_bits + ratio * conditions.factor_bits) / slack_s
        return float(bandwidth_for(rates, snr_hz).sum())

    if needed_hz(0.0) > band_hz:
        return 0.0
    low, high = 0.0, 1.0
    while needed_hz(high) < band_hz:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if needed_hz(middle) <= band_hz else (low, middle)
    return low


def _check(ranks: Sequence[int], most: int) -> None:
    wrong = [rank for rank in ranks if not 1 <= rank <= most]
    if wrong or not ranks:
        asked = f"rank {wrong[0]} is not" if wrong else "there are no"
        raise ExperimentError(
            f"--rank: {asked} among the ranks that every profile and every target module bears, which are 1 to {most}."
        )
