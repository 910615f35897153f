"""Cohorts: distinct, reachable, of the right size, and as likely as the sampler says."""

from collections import Counter

import numpy as np
import pytest

from fedloom.platform.client import Client
from fedloom.platform.experiment import Experiment
from fedloom.platform.world.sampling import SAMPLERS, cohort_of

PROFILES = ("phone", "phone", "phone", "phone", "phone", "laptop", "laptop", "laptop", "server", "server")
POPULATION = [Client(id=f"c{i}", profile=name, rank=2, num_examples=10 * (i + 1)) for i, name in enumerate(PROFILES)]
ALL = np.ones(10, dtype=bool)
DRAWS = 4000


def experiment(sampler="uniform", size=4, seed=0, **changes):
    return Experiment.model_validate({"seed": seed, "cohort": {"size": size, "sampler": sampler} | changes})


def draw(described, number=1, reachable=ALL, seen=None):
    return cohort_of(described, POPULATION, number, reachable, seen or {})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", [1, 4, 10])
def test_a_cohort_is_distinct_reachable_and_as_large_as_it_can_be(sampler, size):
    generator = np.random.default_rng(0)
    for number in range(1, 40):
        reachable = generator.random(10) < 0.5
        cohort = draw(experiment(sampler, size), number, reachable)
        ids = [client.id for client in cohort]
        assert len(set(ids)) == len(ids) == min(size, np.count_nonzero(reachable))
        assert all(reachable[POPULATION.index(client)] for client in cohort)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_cohort_follows_seed_and_round(sampler):
    described = experiment(sampler)
    cohorts = [tuple(client.id for client in draw(described, number)) for number in range(1, 20)]

    assert cohorts == [tuple(client.id for client in draw(described, number)) for number in range(1, 20)]
    assert len(set(cohorts)) > 10
    assert cohorts != [tuple(client.id for client in draw(experiment(sampler, seed=1), n)) for n in range(1, 20)]


def test_over_selection_samples_more():
    assert len(draw(experiment(size=4, over_selection=1.25))) == 5
    assert len(draw(experiment(size=4, over_selection=1.3))) == 6
    assert len(draw(experiment(size=10, over_selection=1.3))) == 10


@pytest.mark.parametrize("sampler", ["uniform", "by_availability"])
def test_alike_means_equally_often(sampler):
    counts = Counter(client.id for number in range(DRAWS) for client in draw(experiment(sampler, size=3), number))
    error = np.sqrt(DRAWS * 0.3 * 0.7)
    assert all(abs(counts[client.id] - 0.3 * DRAWS) < 5 * error for client in POPULATION)


def test_by_examples_the_first_is_drawn_in_proportion():
    counts = Counter(draw(experiment("by_examples"), number)[0].id for number in range(DRAWS))
    total = sum(client.num_examples for client in POPULATION)
    for client in POPULATION:
        share = client.num_examples / total
        assert abs(counts[client.id] - share * DRAWS) < 5 * np.sqrt(DRAWS * share * (1 - share))


def test_by_availability_whoever_was_seen_least_comes_first():
    seen = {client.id: index for index, client in enumerate(POPULATION)}
    assert [client.id for client in draw(experiment("by_availability"), seen=seen)] == ["c0", "c1", "c2", "c3"]
    reachable = ALL.copy()
    reachable[:2] = False
    assert draw(experiment("by_availability"), reachable=reachable, seen=seen)[0].id == "c2"


def test_stratified_every_profile_has_its_share():
    for number in range(20):
        counts = Counter(client.profile for client in draw(experiment("stratified", size=5), number))
        # 2.5, 1.5 and 1 places: of equal remainders the first name rounds up
        assert counts == {"phone": 2, "laptop": 2, "server": 1}


def test_stratified_places_that_cannot_be_filled_go_to_the_others():
    reachable = np.array([name != "laptop" for name in PROFILES])
    cohort = draw(experiment("stratified", size=6), reachable=reachable)
    assert Counter(client.profile for client in cohort).keys() == {"phone", "server"}
    assert len(cohort) == 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nobody_reachable_makes_an_empty_cohort(sampler):
    assert draw(experiment(sampler), reachable=np.zeros(10, dtype=bool)) == []
