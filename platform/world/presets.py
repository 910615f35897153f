"""Populations of published experiments, by name, and the ranks that clients draw.

``population.preset: flexlora-uniform`` stands for a list of profiles with shares (or counts) and ranks; speeds and
links are not published and are left at their defaults. ``population.each`` beside it gives every profile what the
source does not say, e.g. ``{num_gpus: 0.25}``. What the sources leave open is said beside each.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedloom.platform.errors import ExperimentError, clipped, unknown
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import Profile, RankDistribution
from fedloom.platform.seeds import generator_for

Profiles = list[dict[str, Any]]

# FlexLoRA (arXiv:2402.11505), Table 1: ranks of the attention and of the feed-forward modules. Shares from the released
# code.
FLEXLORA_RANKS = {"type-1": (8, 8), "type-2": (30, 30), "type-3": (30, 200), "type-4": (200, 200)}
# Feed-forward modules by the names that Llama, Qwen, GPT-2, GPT-NeoX, BERT, RoBERTa, DistilBERT and OPT give them.
FEED_FORWARD = r"(mlp|ffn|intermediate)\..+|layer\.\d+\.output\.dense|fc1|fc2"
FLEXLORA_SHARES = {
    "flexlora-uniform": (0.25, 0.25, 0.25, 0.25),
    "flexlora-heavy-tail-light": (0.80, 0.05, 0.05, 0.10),
    # As intended: the code orders the types by mistake so that types 3 and 4 dominate. DERIVED, not read in the paper.
    "flexlora-normal": (0.0575, 0.4425, 0.4425, 0.0575),
    "flexlora-heavy-tail-strong": (0.05, 0.05, 0.10, 0.80),
}

# FSLoRA (arXiv:2501.19389): k of every client from the released code's defaults, a = 1, b = 32 of r = 64. Which of
# them belongs to which table of the paper is UNCONFIRMED.
LOWEST, HIGHEST, FSLORA_RANK = 1, 32, 64
FSLORA_CLIENTS, FSLORA_SEED = 50, 42


def expanded(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's document with the profiles of ``population.preset`` in the place of its name.

    Raises:
        ExperimentError: no population has that name, profiles stand beside it, or ``each`` says what it says.
    """
    population = document.get("population")
    if not isinstance(population, Mapping) or population.get("preset") is None:
        return dict(document)
    if "profiles" in population:
        raise ExperimentError("key population.preset: profiles stand beside it. Leave out one of the two.")
    name, each = str(population["preset"]), population.get("each") or {}
    profiles = population_of(name)
    if not isinstance(each, Mapping):
        raise ExperimentError(
            f"key population.each: {clipped(repr(each))} is no mapping; give keys of a profile, e.g. {{num_gpus: 0.25}}"
        )
    taken = sorted({str(key) for profile in profiles for key in profile if key in each})
    if taken:
        raise ExperimentError(
            f"key population.each: the population {name!r} says {', '.join(taken)} itself. Leave {taken[0]} out, or "
            "write population.profiles in place of population.preset."
        )
    rest = {key: value for key, value in population.items() if key not in ("preset", "each")}
    return {**document, "population": {**rest, "profiles": [{**profile, **each} for profile in profiles]}}


def population_of(name: str) -> Profiles:
    """Return the profiles of a published population.

    Raises:
        ExperimentError: there is none of that name; the message gives the nearest one.
    """
    if name not in POPULATIONS:
        raise ExperimentError(f"key population.preset: {unknown('population', name, POPULATIONS)}")
    return POPULATIONS[name]()


def draw_ranks(experiment: Experiment, profiles: Sequence[Profile], ids: Sequence[str]) -> list[int]:
    """Return the rank of each client: its profile's, or drawn from its profile's distribution.

    Args:
        experiment: its seed names the draw.
        profiles: one for each client.
        ids: the clients, in the order of the population, in which they draw.
    """
    if not any(isinstance(profile.rank, RankDistribution) for profile in profiles):
        return [profile.ranks[0] for profile in profiles]
    generator = generator_for(experiment.seed, "ranks")
    draws = torch.rand(len(ids), dtype=torch.float64, generator=generator).tolist()
    return [_rank(profile, draw) for profile, draw in zip(profiles, draws, strict=True)]


def _rank(profile: Profile, draw: float) -> int:
    if not isinstance(profile.rank, RankDistribution):
        return profile.ranks[0]
    values = profile.rank.values
    weights = profile.rank.weights or (1.0,) * len(values)
    bounds = np.cumsum(weights) / math.fsum(weights)
    return values[min(int(np.searchsorted(bounds, draw, side="right")), len(values) - 1)]


def _flexlora(shares: Sequence[float]) -> Profiles:
    profiles: Profiles = []
    for (name, (attention, feed_forward)), share in zip(FLEXLORA_RANKS.items(), shares, strict=True):
        profile: dict[str, Any] = {"name": name, "share": share, "rank": attention}
        if feed_forward != attention:
            profile["rank_pattern"] = {FEED_FORWARD: feed_forward}
        profiles.append(profile)
    return profiles


def _one_profile(weights: Mapping[int, float]) -> Profiles:
    ranks = sorted(rank for rank, weight in weights.items() if weight > 0)
    return [
        {
            "name": "client",
            "share": 1.0,
            "rank": {"values": ranks, "weights": [weights[rank] for rank in ranks]},
        }
    ]


def _rounded_uniform() -> dict[int, float]:
    """Return the probabilities of U(a, b), rounded: the two ends have half of the others'."""
    inner = 1 / (HIGHEST - LOWEST)
    return {rank: inner / 2 if rank in (LOWEST, HIGHEST) else inner for rank in range(LOWEST, HIGHEST + 1)}


def _rounded_normal() -> dict[int, float]:
    """Return the probabilities of N((a + b) / 2, (b - a) / 6), clipped to [a, b] and rounded."""
    mean, deviation = (LOWEST + HIGHEST) / 2, (HIGHEST - LOWEST) / 6

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (deviation * math.sqrt(2))))

    inner = {rank: below(rank + 0.5) - below(rank - 0.5) for rank in range(LOWEST + 1, HIGHEST)}
    return {LOWEST: below(LOWEST + 0.5), **inner, HIGHEST: 1 - below(HIGHEST - 0.5)}


def _heavy_tail() -> dict[int, float]:
    """Return the frequencies in the released code's own sample: 50 clients, numpy's generator with seed 42.

    1 / LogNormal(ln((a + b) / 4), 1), its smallest and largest value stretched to a and b, rounded. Since the sample's
    own extremes enter, the rule has no distribution that is free of the sample.
    """
    generator = np.random.RandomState(FSLORA_SEED)
    sample = 1 / generator.lognormal(math.log((LOWEST + HIGHEST) / 4), 1.0, FSLORA_CLIENTS)
    stretched = LOWEST + (sample - sample.min()) / (sample.max() - sample.min()) * (HIGHEST - LOWEST)
    ranks, counts = np.unique(np.round(stretched).astype(int), return_counts=True)
    return {int(rank): int(count) / FSLORA_CLIENTS for rank, count in zip(ranks, counts, strict=True)}


def _counted(counts: Mapping[int, int]) -> Profiles:
    return [{"name": f"rank-{rank}", "count": count, "rank": rank} for rank, count in counts.items()]


POPULATIONS: dict[str, Callable[[], Profiles]] = {
    **{name: functools.partial(_flexlora, shares) for name, shares in FLEXLORA_SHARES.items()},
    "fslora-homogeneous": lambda: _one_profile({HIGHEST: 1.0}),  # its ratio of r is free; here b / r = 0.5
    "fslora-uniform": lambda: _one_profile(_rounded_uniform()),
    "fslora-normal": lambda: _one_profile(_rounded_normal()),
    "fslora-heavy-tail": lambda: _one_profile(_heavy_tail()),
    "fslora-three-tier": lambda: _one_profile({int(FSLORA_RANK * ratio): 1.0 for ratio in (0.125, 0.25, 0.5)}),
    # FLoRIST (arXiv:2506.09199): the preprint's eight clients, and the hundred of the later repository.
    "florist-8-homogeneous": lambda: _counted({16: 8}),
    "florist-8": lambda: _counted({64: 1, 32: 1, 16: 2, 8: 2, 4: 2}),
    "florist-100": lambda: _counted({64: 10, 32: 10, 16: 20, 8: 20, 4: 40}),
}
