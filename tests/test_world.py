"""Rounds in an unequal world: budgets, time and absences are decided by the experiment alone, and are paid for."""

import math

import numpy as np
import pytest
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.errors import ExperimentError, RoundError
from fedloom.platform.preparation import assemble, world_of

DATA = make_data()
LINKS = {
    "profiles": [
        {
            "name": "slow",
            "share": 1,
            "rank": 2,
            "compute_gflop_per_s": 0.001,
            "uplink_mbit_per_s": 0.1,
            "downlink_mbit_per_s": 1.0,
            "latency_s": 0.05,
        },
        {"name": "fast", "share": 1, "rank": 4, "compute_gflop_per_s": 0.01, "uplink_mbit_per_s": 1.0},
    ]
}
WIRELESS = {"kind": "wireless", "bandwidth_mhz": 0.01}
TSFA = {"name": "tsfa", "latency_limit_s": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def in_time(experiment, seconds):
    return experiment.model_copy(update={"cohort": experiment.cohort.model_copy(update={"deadline_s": seconds})})


def test_a_client_s_seconds_follow_from_its_bytes_and_its_profile(llama):
    experiment = make_experiment(llama, population=LINKS, network={"kind": "links"}, method={"name": "flexlora"})

    for done in finished(experiment)[0][1:]:
        for record in done.records:
            slow = record.profile == "slow"
            assert record.upload_s == pytest.approx(
                8 * record.bytes_up / (1e5 if slow else 1e6) + (0.05 if slow else 0.0)
            )
            assert record.download_s == pytest.approx(8 * record.bytes_down / 1e6 + 0.05 if slow else 0.0)
            assert record.compute_s == pytest.approx(record.flop / (1e6 if slow else 1e7))
        assert done.metrics["sim/round_s"] == max(record.latency_s for record in done.records)


def test_the_clock_adds_up_the_rounds(llama):
    rounds = finished(make_experiment(llama, population=LINKS, network={"kind": "links"}))[0]
    passed = np.cumsum([done.metrics["sim/round_s"] for done in rounds[1:]])
    assert [done.metrics["sim/seconds"] for done in rounds[1:]] == pytest.approx(passed.tolist())


def test_a_world_without_cost_has_no_clock(llama):
    rounds = finished(make_experiment(llama))[0]
    assert not any(name.startswith("sim/") for done in rounds for name in done.metrics)
    assert all(record.latency_s == 0 and math.isnan(record.importance) for done in rounds for record in done.records)


def test_stragglers_are_cut_named_and_not_merged(llama):
    free = make_experiment(llama, population=LINKS, network={"kind": "links"}, method={"name": "flexlora"}, rounds=1)
    latencies = sorted(record.latency_s for record in finished(free)[0][1].records)
    deadline_s = (latencies[1] + latencies[2]) / 2

    (_, done) = finished(in_time(free, deadline_s))[0]

    late = [record for record in done.records if record.refused is not None]
    assert len(late) == 2
    assert all("past the deadline" in record.refused and record.latency_s > deadline_s for record in late)
    assert done.metrics["updates"] == 2
    assert done.metrics["stragglers"] == 2
    assert done.metrics["sim/round_s"] == deadline_s


def test_a_deadline_that_nobody_meets_ends_the_run_or_is_recorded(llama):
    experiment = in_time(make_experiment(llama, population=LINKS, network={"kind": "links"}), 1e-6)

    with pytest.raises(RoundError, match=r"0 of 4 updates.*past the deadline.*on_missing"):
        finished(experiment)[0]

    skipping = experiment.cohort.model_copy(update={"on_missing": "skip"})
    rounds = finished(experiment.model_copy(update={"cohort": skipping}))[0]
    assert [done.metrics["updates"] for done in rounds[1:]] == [0, 0, 0]
    assert len({done.metrics["eval/loss"] for done in rounds}) == 1
    assert all(record.bytes_up == 0 and record.steps == 0 for done in rounds for record in done.records)


def test_a_population_of_which_nobody_is_reachable(llama, tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"c{client},2,2" for client in range(6)]
    trace.write_text("\n".join(["client,from_round,to_round", *lines]) + "\n")
    population = LINKS | {"availability_trace": str(trace)}
    cohort = {"size": 4, "on_missing": "skip"}

    rounds = finished(make_experiment(llama, population=population, cohort=cohort))[0]

    assert [len(done.records) for done in rounds] == [0, 0, 4, 0]
    assert [done.metrics["reachable"] for done in rounds[1:]] == [0, 6, 0]
    with pytest.raises(RoundError, match="no client was reachable"):
        finished(make_experiment(llama, population=population))[0]


@pytest.mark.parametrize("method", ["soft", "fslora"])
def test_tsfa_steers_any_method_that_has_a_ratio(llama, method):
    """No band is given twice, nobody sends more than planned, and no client is later than the planned latency."""
    profiles = [{"name": "phone", "share": 1, "rank": 8, "compute_gflop_per_s": 0.1}]
    experiment = make_experiment(
        llama,
        population={"profiles": profiles},
        network=WIRELESS,
        controller=TSFA,
        method={"name": method},
        rounds=6,
    )

    rounds = finished(experiment)[0][1:]

    ratios = [record.ratio for done in rounds for record in done.records]
    assert min(ratios) < 1.0
    assert all(ratio * 8 == int(ratio * 8) >= 1 for ratio in ratios)
    for done in rounds:
        assert sum(record.bandwidth_hz for record in done.records) <= 1e5 * (1 + 1e-9)
        assert done.metrics["sim/round_s"] <= done.metrics["controller/theta_s"] * (1 + 1e-9)


def test_a_controller_of_ratios_needs_a_method_with_one(llama):
    experiment = make_experiment(llama, network=WIRELESS, controller=TSFA)
    with pytest.raises(ExperimentError, match=r"'tsfa' steers ratios.*'fedit' has none.*fslora, soft"):
        world_of(experiment, assemble(experiment, DATA))


def test_a_fixed_ratio_for_everybody_needs_one_too(llama):
    experiment = make_experiment(llama, controller={"name": "fixed", "ratio": 0.5})
    with pytest.raises(ExperimentError, match=r"'fixed' steers ratios.*'fedit' has none"):
        world_of(experiment, assemble(experiment, DATA))


def test_the_world_repeats_by_its_seed(llama):
    experiment = make_experiment(llama, network=WIRELESS, controller=TSFA, method={"name": "soft"})
    other = experiment.model_copy(update={"seed": 1})

    first, again, different = (
        [done.metrics["sim/round_s"] for done in finished(version)[0][1:]]
        for version in (experiment, experiment, other)
    )

    assert first == again != different


def test_targets_are_reached_once(llama):
    rounds = finished(
        make_experiment(llama, population=LINKS, network={"kind": "links"}, evaluation={"targets": [0.01, 0.999]})
    )[0]
    reached = [name for done in rounds for name in done.metrics if name.startswith("to_accuracy/")]
    assert reached == ["to_accuracy/0.01/bytes", "to_accuracy/0.01/sim_seconds"]
