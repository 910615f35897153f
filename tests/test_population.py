"""Who takes part, and on which actors: decided by the experiment alone."""

from collections import Counter

import pytest

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, clients_of, pools_of, tasks_of, threads_of


def experiment(profiles, **changes):
    return Experiment.model_validate({"population": {"profiles": profiles}, "cohort": {"size": 5}} | changes)


MIXED = [
    {"name": "phone", "share": 0.5, "rank": 4, "num_cpus": 0.5},
    {"name": "laptop", "share": 0.3, "rank": 8, "num_cpus": 0.5},
    {"name": "server", "count": 2, "rank": 16, "num_cpus": 2, "resources": {"rack": 1}},
]
SIZES = {f"c{i}": 10 + i for i in range(10)}


def test_counts_are_kept_and_shares_divide_the_rest():
    """Two of ten are fixed; 0.5 and 0.3 of the other eight are 5 and 3."""
    clients = clients_of(experiment(MIXED), SIZES)

    assert {"phone": 5, "laptop": 3, "server": 2} == Counter(client.profile for client in clients)
    assert list(SIZES) == [client.id for client in clients]
    assert list(SIZES.values()) == [client.num_examples for client in clients]


@pytest.mark.parametrize("population", range(5, 40))
def test_every_client_gets_a_profile_whatever_the_rounding(population):
    shares = [{"name": name, "share": share} for name, share in (("a", 1), ("b", 1), ("c", 1))]

    clients = clients_of(experiment(shares), {f"c{i}": 1 for i in range(population)})

    counts = Counter(client.profile for client in clients)
    assert population == sum(counts.values())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_profiles_follow_the_seed():
    first, again = (clients_of(experiment(MIXED, seed=3), SIZES) for _ in range(2))
    other = clients_of(experiment(MIXED, seed=4), SIZES)

    assert first == again
    assert first != other


def test_a_cohort_larger_than_the_population_is_refused_with_both_numbers():
    with pytest.raises(ExperimentError, match="cohort of 11 is larger than the population of 10"):
        clients_of(experiment(MIXED, cohort={"size": 11}), SIZES)


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ExperimentError, match="add up to 11 but the partition has 10"):
        clients_of(experiment([{"name": "a", "count": 11}]), SIZES)
    with pytest.raises(ExperimentError, match="add up to 9 but the partition has 10"):
        clients_of(experiment([{"name": "a", "count": 9}]), SIZES)


def test_profiles_that_ask_for_the_same_share_a_pool():
    pools = pools_of(experiment(MIXED))

    assert [0.5, 2.0] == [dict(pool)["num_cpus"] for pool in pools]
    assert [1, 2] == [threads_of(pool) for pool in pools]


def test_chunks_hold_the_cohort_once_in_cohort_order_within_a_pool():
    described = experiment(MIXED, chunk_size=2, cohort={"size": 10})
    clients = clients_of(described, SIZES)
    cohort = clients[::-1]

    chunks = chunks_of(described, tasks_of(described, cohort, ["q_proj"]))

    assert list(range(len(chunks))) == [chunk.index for chunk in chunks]
    assert all(1 <= len(chunk.tasks) <= 2 for chunk in chunks)
    assert {client.id for client in cohort} == {task.client.id for chunk in chunks for task in chunk.tasks}
    for pool in pools_of(described):
        order = [task.client for chunk in chunks if chunk.pool == pool for task in chunk.tasks]
        assert [client for client in cohort if client in order] == order
