"""Who of the reachable clients takes part in a round.

A round wants ``cohort.size`` clients and samples ``over_selection`` times as many, without replacement, in case some
miss the deadline; if fewer are reachable, all of them. ``cohort.sampler`` says how:

    uniform           every reachable client with the same probability
    by_examples       one after the other, each with a probability proportional to its number of examples among those
                      that are left
    by_availability   those who took part least often first; equals in a random order
    stratified        each profile's share of the cohort is its share of the population, rounded by largest
                      remainders; uniform within a profile. Places that a profile cannot fill go to the others

The draw is named by the round, so a cohort depends on the seed, the round, who is reachable and, for
``by_availability``, the earlier cohorts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fedloom.platform.client import Client
from fedloom.platform.experiment import Experiment
from fedloom.platform.seeds import generator_for

Order = Callable[[Experiment, Sequence[Client], torch.Generator, Mapping[str, int]], list[int]]


def cohort_of(
    experiment: Experiment,
    clients: Sequence[Client],
    number: int,
    reachable: np.ndarray,
    seen: Mapping[str, int],
) -> list[Client]:
    """Sample the clients of round ``number``, in the order of the draw.

    Args:
        experiment: its seed and its cohort section.
        clients: the population.
        number: the round, counted from 1.
        reachable: bool (N,), in the order of the population.
        seen: in how many earlier cohorts each client was, by id; who is missing was in none.

    Returns:
        Distinct reachable clients; none if nobody is reachable.
    """
    able = [clients[position] for position in np.flatnonzero(reachable).tolist()]
    wanted = experiment.cohort.places
    generator = generator_for(experiment.seed, "cohort", number)
    order = SAMPLERS[experiment.cohort.sampler](experiment, able, generator, seen)
    if experiment.cohort.sampler == "stratified":
        order = _by_quota(clients, able, order, wanted)
    return [able[position] for position in order[:wanted]]


def _uniform(
    experiment: Experiment, able: Sequence[Client], generator: torch.Generator, seen: Mapping[str, int]
) -> list[int]:
    order: list[int] = torch.randperm(len(able), generator=generator).tolist()
    return order


def _by_examples(
    experiment: Experiment, able: Sequence[Client], generator: torch.Generator, seen: Mapping[str, int]
) -> list[int]:
    # Of exponential times with rate n_k the smallest come in the order of weighted draws without replacement.
    times = torch.empty(len(able), dtype=torch.float64).exponential_(generator=generator)
    examples = torch.tensor([client.num_examples for client in able], dtype=torch.float64)
    order: list[int] = (times / examples).argsort(stable=True).tolist()
    return order


def _by_availability(
    experiment: Experiment, able: Sequence[Client], generator: torch.Generator, seen: Mapping[str, int]
) -> list[int]:
    order = _uniform(experiment, able, generator, seen)
    return sorted(order, key=lambda position: seen.get(able[position].id, 0))  # a stable sort keeps the draw of equals


SAMPLERS: dict[str, Order] = {
    "uniform": _uniform,
    "by_examples": _by_examples,
    "by_availability": _by_availability,
    "stratified": _uniform,
}


def _by_quota(clients: Sequence[Client], able: Sequence[Client], order: Sequence[int], wanted: int) -> list[int]:
    """Move those who fill their profile's places to the front, both parts in the order of the draw."""
    quotas = _quotas(Counter(client.profile for client in clients), min(wanted, len(able)))
    first: list[int] = []
    rest: list[int] = []
    for position in order:
        profile = able[position].profile
        taken = quotas[profile] > 0
        quotas[profile] -= taken
        (first if taken else rest).append(position)
    return first + rest


def _quotas(sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Divide ``wanted`` places in proportion to the sizes; the largest remainders, by name among equals, round up."""
    total = sum(sizes.values())
    exact = {name: wanted * size / total for name, size in sorted(sizes.items())}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: wanted - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
