"""Who there is, who takes part, and on which actors they run."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import Profile
from fedloom.platform.seeds import generator_for
from fedloom.platform.world.clock import Timing
from fedloom.platform.world.presets import draw_ranks

CHUNKS_PER_COHORT = 16  # enough to keep a few actors equally busy, few enough that folding them costs little
Resources = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One client's part in one round; ``timing`` puts it on the simulated clock."""

    client: Client
    budget: Budget
    timing: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that train one client together under DeepSpeed; ``options`` is DeepSpeed's JSON, as text."""

    workers: int
    options: str


NO_GROUPS: Mapping[Resources, Group] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Clients that one call of a client actor trains, in cohort order; ``pool`` says which actors may."""

    index: int
    pool: Resources
    tasks: tuple[Task, ...]


def resources_of(profile: Profile) -> Resources:
    """Return what Ray is asked for by an actor of this profile: the name of its pool."""
    demand = {"num_cpus": profile.num_cpus, "num_gpus": profile.num_gpus, **profile.resources}
    if profile.memory_gib is not None:
        demand["memory_gib"] = profile.memory_gib
    return tuple(sorted(demand.items()))


def threads_of(pool: Resources) -> int:
    """Return the threads of an actor: whole CPUs, at least one, so that bits do not depend on the machine."""
    return max(1, int(dict(pool)["num_cpus"]))


def pools_of(experiment: Experiment) -> list[Resources]:
    """Return the distinct demands of the profiles: those that ask for the same share one pool of actors."""
    return sorted({resources_of(profile) for profile in experiment.population.profiles})


def groups_of(experiment: Experiment) -> dict[Resources, Group]:
    """Return the pools whose clients are trained by DeepSpeed, and by how many processes.

    Raises:
        ExperimentError: two profiles ask for the same machine and have different trainers.
    """
    first: dict[Resources, Profile] = {}
    groups = {}
    for profile in experiment.population.profiles:
        pool = resources_of(profile)
        other = first.setdefault(pool, profile)
        if any(getattr(profile, key) != getattr(other, key) for key in ("trainer", "workers", "deepspeed")):
            raise ExperimentError(
                f"key population.profiles: {other.name!r} and {profile.name!r} ask for the same machine and so share "
                "actors, but differ in trainer, workers or deepspeed. Let one ask for more, e.g. another num_cpus."
            )
        if profile.trainer == "deepspeed":
            groups[pool] = Group(workers=profile.workers, options=json.dumps(profile.deepspeed, sort_keys=True))
    return groups


def clients_of(experiment: Experiment, num_examples: Mapping[str, int]) -> list[Client]:
    """Give every client of the partition a profile, by a draw from the experiment's seed.

    Raises:
        ExperimentError: the profiles' counts, or the cohort, are larger than the population.
    """
    ids = list(num_examples)
    if experiment.cohort.size > len(ids):
        raise ExperimentError(
            f"key cohort.size: a cohort of {experiment.cohort.size} is larger than the population of {len(ids)} "
            f"clients. Set cohort.size to at most {len(ids)}."
        )
    profiles = _profile_sequence(experiment.population.profiles, len(ids))
    order = torch.randperm(len(ids), generator=generator_for(experiment.seed, "profiles")).tolist()
    by_position = dict(zip(order, profiles, strict=True))
    chosen = [by_position[position] for position in range(len(ids))]
    return [
        Client(id=name, profile=profile.name, rank=rank, num_examples=num_examples[name])
        for name, profile, rank in zip(ids, chosen, draw_ranks(experiment, chosen, ids), strict=True)
    ]


def _profile_sequence(profiles: Sequence[Profile], population: int) -> list[Profile]:
    """Repeat each profile as often as its count or share says; the largest remainders get what is left over."""
    fixed = sum(profile.count or 0 for profile in profiles)
    shared = [profile for profile in profiles if profile.share is not None]
    if fixed > population or (fixed < population and not shared):
        raise ExperimentError(
            f"key population.profiles: the counts add up to {fixed} but the partition has {population} clients. "
            "Let one profile have a share, or change partition.num_clients."
        )
    left = population - fixed
    total = sum(profile.share or 0.0 for profile in shared)
    exact = {profile.name: left * (profile.share or 0.0) / total for profile in shared}
    counts = {profile.name: profile.count or int(exact.get(profile.name, 0)) for profile in profiles}
    by_remainder = sorted(shared, key=lambda profile: int(exact[profile.name]) - exact[profile.name])
    for profile in by_remainder[: population - sum(counts.values())]:
        counts[profile.name] += 1
    return [profile for profile in profiles for _ in range(counts[profile.name])]


def tasks_of(experiment: Experiment, cohort: Sequence[Client], modules: Collection[str]) -> list[Task]:
    """Give every client of a cohort the budget of its profile for the target modules, and no clock."""
    profiles = {profile.name: profile for profile in experiment.population.profiles}
    return [Task(client=client, budget=budget_of(profiles[client.profile], client.rank, modules)) for client in cohort]


def budget_of(profile: Profile, rank: int, modules: Collection[str]) -> Budget:
    """Return what a client of a profile may spend if nobody decides otherwise, given its rank."""
    if not profile.rank_pattern:
        return Budget(rank=rank, ratio=profile.ratio)
    ranks = profile.ranks_in(modules, rank)
    smallest = min(ranks.values())
    return Budget(rank=smallest, ranks=ranks if set(ranks.values()) != {smallest} else {}, ratio=profile.ratio)


def chunks_of(experiment: Experiment, tasks: Sequence[Task]) -> list[Chunk]:
    """Cut a cohort into chunks: by pool, then in cohort order, never by the number of actors."""
    pool_of = {profile.name: resources_of(profile) for profile in experiment.population.profiles}
    by_pool: dict[Resources, list[Task]] = {pool: [] for pool in pools_of(experiment)}
    for task in tasks:
        by_pool[pool_of[task.client.profile]].append(task)
    size = experiment.chunk_size or math.ceil(experiment.cohort.size / CHUNKS_PER_COHORT)
    pieces = [
        (pool, tuple(members[start : start + size]))
        for pool, members in by_pool.items()
        for start in range(0, len(members), size)
    ]
    return [Chunk(index=index, pool=pool, tasks=members) for index, (pool, members) in enumerate(pieces)]
