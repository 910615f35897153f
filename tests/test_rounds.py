"""The round loop in this process: what is counted, refused and repeated."""

import dataclasses

import pytest
import torch
from small import KINDS, finished, make_data, make_experiment, save_llama, save_roberta

from fedloom.platform import worker as worker_module
from fedloom.platform.driver import run
from fedloom.platform.errors import ExperimentError, RoundError
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble, global_rank
from fedloom.platform.registry import method_names

DATA = make_data()
LEARNS_WITH = {  # an adaptive step has a length of its own: the published 1e-3 takes more rounds than a test has
    "flasc": {"server_lr": 0.02},
    "fedopt": {"server_lr": 0.02},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return save_roberta(tmp_path_factory.mktemp("models") / "roberta")


def without_clock(rounds):
    return [{name: value for name, value in done.metrics.items() if name != "seconds"} for done in rounds]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_experiment_gives_the_same_bits(llama, name):
    experiment = make_experiment(llama, method={"name": name})

    (first, adapter), (again, twin) = finished(experiment), finished(experiment)

    assert without_clock(first) == without_clock(again)
    assert all(torch.equal(tensor, twin.tensors()[key]) for key, tensor in adapter.tensors().items())


@pytest.mark.parametrize("name", method_names())
def test_every_method_learns(llama, roberta, name):
    """The class can be read off the first token: training falls below where it began, on a decoder and an encoder."""
    lean = {
        "training": {"learning_rate": 0.02, "batch_size": 8, "steps": 8},
        "cohort": {"size": 2},
        "evaluation": {"every": 3, "clients": 0},
    }
    data = make_data(num_clients=2, per_client=24)
    for folder in (llama, roberta) if name in KINDS else (llama,):
        method = {"name": name, **LEARNS_WITH.get(name, {})}
        rounds, _ = finished(make_experiment(folder, method=method, **lean), data)

        assert rounds[-1].metrics["train/loss"] < rounds[1].metrics["train/loss"], folder.name


@pytest.mark.parametrize("name", KINDS)
def test_causal_lm_runs_without_a_head(llama, name):
    data = make_data(task="causal_lm")
    experiment = make_experiment(
        llama, method={"name": name}, data={"task": "causal_lm"}, training={"learning_rate": 0.02, "steps": 8}
    )

    rounds, adapter = finished(experiment, data)

    assert not adapter.head
    assert rounds[-1].metrics["train/loss"] < rounds[1].metrics["train/loss"]


def test_a_head_needs_a_classifier(llama):
    experiment = make_experiment(llama, method={"name": "head_only"}, data={"task": "causal_lm"})

    with pytest.raises(ExperimentError, match="'head_only' trains a classifier's head"):
        global_rank(experiment, assemble(experiment, make_data(task="causal_lm")))


def test_bytes_are_those_of_the_payloads(llama):
    """FedIT at the smallest rank 2: every client moves r (d_in + d_out) values per module and the head, both ways."""
    experiment = make_experiment(llama)
    prepared = assemble(experiment, DATA)
    values = sum(2 * (d_out + d_in) for d_out, d_in in prepared.shapes.values()) + 3 * 16

    rounds, _ = finished(experiment)

    for done in rounds[1:]:
        assert 4 * values * 4 == done.metrics["bytes/down"] == done.metrics["bytes/up"]
    assert 3 * 2 * 4 * values * 4 == rounds[-1].metrics["bytes/total"]


def test_a_client_that_was_away_is_charged_for_the_patches_it_missed(llama):
    """FLoRIST's merge flow: a client downloads every piece that it does not hold yet, once."""
    experiment = make_experiment(llama, rounds=4, cohort={"size": 3}, method={"name": "florist"})
    prepared = assemble(experiment, DATA)
    sides = {module: d_out + d_in for module, (d_out, d_in) in prepared.shapes.items()}
    executor = LocalExecutor(prepared.spec, DATA, pools_of(experiment))
    pieces, held = [], {}
    for done in run(experiment, prepared, executor):
        for record in done.records:
            missed = sum(pieces[held.get(record.client, 0) :])
            assert 8 + 3 * 16 * 4 + missed == record.bytes_down
            held[record.client] = len(pieces)
        ranks = executor.export().ranks
        whole = sum(4 * rank * sides[module] for module, rank in ranks.items())
        if done.number:
            pieces.append(whole - sum(pieces))
    assert len(pieces) == 4


def test_an_update_that_is_not_finite_is_left_out_and_named(llama, monkeypatch):
    """The round goes on with the others, and equals a round in which that client never trained."""
    experiment = make_experiment(llama, rounds=1)
    victim = finished(experiment)[0][1].records[1].client
    train_client = worker_module.train_client

    def spoilt(*args, client, **kwargs):
        trained = train_client(*args, client=client, **kwargs)
        if client == victim:
            next(iter(trained.adapter.factors.values())).B[0, 0] = float("nan")
        return trained

    monkeypatch.setattr(worker_module, "train_client", spoilt)
    rounds, adapter = finished(experiment)

    (refused,) = [record for record in rounds[1].records if record.refused]
    assert victim == refused.client
    assert "not finite" in refused.refused
    assert rounds[1].metrics["updates"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors().values())


def test_too_few_updates_end_the_run_with_both_numbers(llama, monkeypatch):
    def hopeless(*args, **kwargs):
        return dataclasses.replace(train_client(*args, **kwargs), loss=float("inf"))

    train_client = worker_module.train_client
    monkeypatch.setattr(worker_module, "train_client", hopeless)

    with pytest.raises(RoundError, match=r"round 1: 0 of 4 updates were accepted.*training loss is inf"):
        finished(make_experiment(llama))


def test_evaluation_follows_its_interval_and_never_misses_the_ends(llama):
    rounds, _ = finished(make_experiment(llama, rounds=5, evaluation={"every": 2}))

    assert [done.number for done in rounds if "eval/accuracy" in done.metrics] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"rank": 4}}, "FedIT trains every client at rank 4, but profile 'small' bears only 2"),
        ({"adapter": {"rank": 3}, "method": {"name": "flexlora"}}, "smaller than the rank 4 of profile 'large'"),
        ({"adapter": {"rank": 9}, "method": {"name": "fslora"}}, "larger than module .* allows, which is 8 x 16"),
    ],
)
def test_ranks_that_cannot_be_are_refused_with_the_right_one(llama, changes, message):
    experiment = make_experiment(llama, **changes)

    with pytest.raises(ExperimentError, match=message):
        global_rank(experiment, assemble(experiment, DATA))
