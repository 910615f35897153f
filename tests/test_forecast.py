"""A plan predicts what a run then pays."""

import pytest
from small import finished, make_data, make_experiment, save_llama
from typer.testing import CliRunner

from fedloom.jobs.main import app
from fedloom.jobs.plan import in_words, show_plan
from fedloom.jobs.probe import probe
from fedloom.platform.errors import ExperimentError
from fedloom.platform.preparation import assemble
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


# The sizes of FLoRIST's messages follow from spectra, those of LoRA-A2's from what its clients choose.
@pytest.mark.parametrize("name", sorted(set(method_names()) - {"florist", "lora_a2"}))
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


def test_a_probe_trains_every_profile_and_evaluates(llama):
    measured = probe(assemble(make_experiment(llama, population={"profiles": PROFILES}), DATA))
    assert set(measured.training_s) == {"slow", "fast"}
    assert all(0 < seconds < 60 for seconds in [*measured.training_s.values(), measured.evaluation_s])
    assert measured.memory_gib > 0.1  # torch alone is more


def test_a_plan_shows_every_profile_and_the_totals(llama, capsys):
    experiment = make_experiment(llama, population={"profiles": PROFILES}, cohort={"size": 4, "over_selection": 1.5})

    show_plan(assemble(experiment, DATA))

    shown = capsys.readouterr().out
    for part in ("6 clients, 6 of them in each of 3 rounds", "bytes up", "simulated time", "slow", "fast", "in 4 eval"):
        assert part in " ".join(shown.split())


def test_clients_beyond_the_cohort_s_size_are_counted(llama):
    """Over-selection trains more clients than the cohort wants, and they take their time."""
    plain, over = (make_experiment(llama, cohort={"size": 2, "over_selection": share}) for share in (1.0, 3.0))
    once, thrice = (forecast(experiment, assemble(experiment, DATA)) for experiment in (plain, over))
    assert len(thrice.records) / thrice.rounds == 3 * len(once.records) / once.rounds == 6


def test_a_pool_that_this_machine_cannot_hold_is_refused(llama):
    for key in ("num_cpus", "memory_gib"):
        profiles = [{"name": "huge", "share": 1, key: 100_000}]
        experiment = make_experiment(llama, population={"profiles": profiles})
        with pytest.raises(ExperimentError, match=f"{key} 100000"):
            show_plan(assemble(experiment, DATA), measure=False)


def test_the_command_plans_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(app, ["plan", "wireless", "--no-probe"])

    assert done.exit_code == 0, done.output
    for part in ("wireless: soft, 40 clients, 8 of them in each of 16 rounds", "simulated time", "workstation"):
        assert part in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "words"), [(0.0123, "0.0123 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_times_have_units(seconds, words):
    assert in_words(seconds) == words
