"""A plan predicts what a run then pays."""

import pytest
from small import finished, make_data, make_experiment, save_llama

from fedloom.jobs.plan import in_words, probe_seconds, show_plan
from fedloom.platform.driver import assemble
from fedloom.platform.errors import ExperimentError
from fedloom.platform.registry import method_names
from fedloom.platform.world.forecast import forecast

DATA = make_data()
PROFILES = [
    {"name": "slow", "share": 1, "rank": 2, "compute_gflop_per_s": 0.001},
    {"name": "fast", "share": 1, "rank": 4, "compute_gflop_per_s": 0.01},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"florist"}))  # its messages' sizes follow from spectra
def test_bytes_operations_and_simulated_seconds_are_those_of_the_run(llama, name):
    experiment = make_experiment(
        llama, population={"profiles": PROFILES}, network={"kind": "wireless"}, method={"name": name}
    )
    prepared = assemble(experiment, DATA)

    predicted = forecast(experiment, prepared)
    paid = finished(experiment)[0][1:]

    assert predicted.bytes_up == pytest.approx(sum(done.metrics["bytes/up"] for done in paid) / 3)
    assert predicted.bytes_down == pytest.approx(sum(done.metrics["bytes/down"] for done in paid) / 3)
    assert predicted.flop == pytest.approx(sum(done.metrics["sim/flop"] for done in paid) / 3)
    assert predicted.sim_s == pytest.approx(sum(done.metrics["sim/round_s"] for done in paid) / 3)


def test_florist_s_uploads_are_exact_too(llama):
    experiment = make_experiment(llama, method={"name": "florist"})
    prepared = assemble(experiment, DATA)
    paid = finished(experiment)[0][1:]
    assert forecast(experiment, prepared).bytes_up == pytest.approx(sum(d.metrics["bytes/up"] for d in paid) / 3)


def test_without_a_clock_there_is_no_simulated_time_but_there_are_operations(llama):
    experiment = make_experiment(llama)
    predicted = forecast(experiment, assemble(experiment, DATA), rounds=1)
    assert predicted.sim_s is None
    assert predicted.flop > 0


def test_stragglers_are_foreseen(llama):
    cohort = {"size": 4, "deadline_s": 1e-6, "on_missing": "skip"}
    experiment = make_experiment(llama, population={"profiles": PROFILES}, cohort=cohort)
    assert forecast(experiment, assemble(experiment, DATA)).stragglers == 4


def test_a_probe_trains_for_real(llama):
    experiment = make_experiment(llama)
    assert 0 < probe_seconds(experiment, assemble(experiment, DATA)) < 60


def test_a_plan_shows_every_profile_and_the_totals(llama, capsys):
    experiment = make_experiment(llama, population={"profiles": PROFILES}, cohort={"size": 6})

    show_plan(experiment, assemble(experiment, DATA), probe=False)

    shown = capsys.readouterr().out
    for part in ("6 clients, 6 of them in each of 3 rounds", "bytes up", "simulated time", "slow", "fast"):
        assert part in " ".join(shown.split())


def test_a_pool_that_this_machine_cannot_hold_is_refused(llama):
    profiles = [{"name": "huge", "share": 1, "num_cpus": 10_000}]
    experiment = make_experiment(llama, population={"profiles": profiles})
    with pytest.raises(ExperimentError, match="num_cpus 10000"):
        show_plan(experiment, assemble(experiment, DATA), probe=False)


@pytest.mark.parametrize(("seconds", "words"), [(0.0123, "0.0123 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_times_have_units(seconds, words):
    assert in_words(seconds) == words
