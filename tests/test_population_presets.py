"""Published populations: valid, and as their sources' rules say."""

import numpy as np
import pytest

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.experiment_world import PopulationSection, Profile
from fedloom.platform.population import clients_of
from fedloom.platform.world.presets import POPULATIONS, draw_ranks, expanded, population_of

SAMPLE = 200_000


@pytest.mark.parametrize("name", POPULATIONS)
def test_every_population_is_valid_and_can_be_dealt_out(name):
    section = PopulationSection.model_validate({"profiles": population_of(name)})
    size = sum(profile.count or 0 for profile in section.profiles) or 50
    experiment = Experiment.model_validate({"population": section.model_dump(), "cohort": {"size": 5}})

    clients = clients_of(experiment, {f"c{i}": 10 for i in range(size)})

    ranks = {profile.name: profile.ranks for profile in section.profiles}
    assert all(client.rank in ranks[client.profile] for client in clients)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("fslora-uniform", lambda rng: rng.uniform(1, 32, SAMPLE)),
        ("fslora-normal", lambda rng: rng.normal(16.5, 31 / 6, SAMPLE)),
        ("fslora-three-tier", lambda rng: rng.choice([8, 16, 32], SAMPLE)),
    ],
)
def test_fslora_s_weights_are_those_of_its_rule(name, rule):
    ranks = np.round(np.clip(rule(np.random.default_rng(0)), 1, 32)).astype(int)
    (profile,) = population_of(name)
    values, weights = profile["rank"]["values"], np.array(profile["rank"]["weights"])
    weights = weights / weights.sum()

    frequencies = np.array([np.mean(ranks == value) for value in values])

    assert set(np.unique(ranks)) <= set(values)
    assert np.all(np.abs(frequencies - weights) < 5 * np.sqrt(weights * (1 - weights) / SAMPLE) + 1e-12)


def test_fslora_s_heavy_tail_is_the_sample_of_the_released_code():
    """Its mean, smallest and largest rank were read off a run of the code's own generator."""
    (profile,) = population_of("fslora-heavy-tail")
    values, weights = profile["rank"]["values"], profile["rank"]["weights"]
    assert np.dot(values, weights) == pytest.approx(8.48)
    assert (min(values), max(values)) == (1, 32)


def test_counts_and_shares_are_the_published_ones():
    assert sum(profile["count"] for profile in population_of("florist-8")) == 8
    assert sum(profile["count"] * profile["rank"] for profile in population_of("florist-8")) == 152
    assert population_of("florist-8-homogeneous") == [{"name": "rank-16", "count": 8, "rank": 16}]
    assert sum(profile["count"] for profile in population_of("florist-100")) == 100
    for name in POPULATIONS:
        if name.startswith("flexlora"):
            assert sum(profile["share"] for profile in population_of(name)) == pytest.approx(1)


def test_flexlora_s_normal_population_is_of_the_types_in_the_middle():
    """A normal density over the types by size, mean 1.5, deviation 0.7; the released code favours types 3 and 4."""
    densities = np.exp(-(((np.arange(4) - 1.5) / 0.7) ** 2) / 2)
    shares = [profile["share"] for profile in population_of("flexlora-normal")]

    assert [profile["name"] for profile in population_of("flexlora-normal")] == ["type-1", "type-2", "type-3", "type-4"]
    assert shares == pytest.approx(densities / densities.sum(), abs=5e-4)


def test_a_preset_stands_for_its_profiles():
    experiment = validated({"population": {"preset": "florist-8"}, "cohort": {"size": 5}}, place="x.yaml")
    assert [profile.rank for profile in experiment.population.profiles] == [64, 32, 16, 8, 4]
    assert expanded({"seed": 1}) == {"seed": 1}


def test_each_profile_gets_what_the_source_does_not_say():
    population = {"preset": "florist-8", "each": {"num_gpus": 0.5, "uplink_mbit_per_s": 10}}
    profiles = validated({"population": population, "cohort": {"size": 5}}, place="x.yaml").population.profiles
    assert {(profile.num_gpus, profile.uplink_mbit_per_s) for profile in profiles} == {(0.5, 10)}
    assert [profile.rank for profile in profiles] == [64, 32, 16, 8, 4]


@pytest.mark.parametrize(
    ("each", "said"), [({"rank": 4}, "says rank itself"), ([1], "is no mapping"), ({"num_gpu": 1}, "'num_gpus'")]
)
def test_each_can_change_nothing_that_is_published(each, said):
    with pytest.raises(ExperimentError, match=said):
        validated({"population": {"preset": "florist-8", "each": each}}, place="x.yaml")


def test_a_wrong_name_and_doubled_profiles_are_refused():
    with pytest.raises(ExperimentError, match=r"'florist-9'. Did you mean 'florist-8'"):
        validated({"population": {"preset": "florist-9"}}, place="x.yaml")
    with pytest.raises(ExperimentError, match="profiles stand beside it"):
        expanded({"population": {"preset": "florist-8", "profiles": []}})


def test_drawn_ranks_follow_the_weights_and_the_seed():
    profile = Profile.model_validate({"name": "p", "share": 1, "rank": {"values": [2, 4, 8], "weights": [1, 2, 1]}})
    ids = [f"c{i}" for i in range(4000)]
    first, again = (draw_ranks(Experiment(seed=1), [profile] * 4000, ids) for _ in range(2))

    assert first == again != draw_ranks(Experiment(seed=2), [profile] * 4000, ids)
    for value, share in ((2, 0.25), (4, 0.5), (8, 0.25)):
        assert abs(first.count(value) - 4000 * share) < 5 * np.sqrt(4000 * share * (1 - share))
