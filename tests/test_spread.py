"""How the final model serves single clients: scores on their own examples, and their spread."""

import csv
import io

import numpy as np
import pytest
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.evaluation import ClientScore, client_shards_of, clients_csv, spread
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.pictures import client_accuracy
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.wire import pack_adapter

DATA = make_data()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def scores(accuracies):
    return [
        ClientScore(client=f"c{i}", profile="p", rank=4, num_examples=10, loss=1.0, accuracy=float(accuracy))
        for i, accuracy in enumerate(accuracies)
    ]


def described(**evaluation):
    return Experiment.model_validate({"evaluation": evaluation})


def test_equal_clients_have_no_spread():
    assert spread(scores([0.5] * 7)) == {
        "clients/accuracy/mean": 0.5,
        "clients/accuracy/std": 0.0,
        "clients/accuracy/worst_decile": 0.5,
    }
    assert spread([]) == {}


@pytest.mark.parametrize("count", [1, 9, 10, 25, 100])
def test_the_worst_decile_is_the_mean_of_the_worst_tenth(count):
    drawn = np.random.default_rng(count).random(count)
    found = spread(scores(drawn))
    assert found["clients/accuracy/worst_decile"] == pytest.approx(np.mean(sorted(drawn)[: max(1, count // 10)]))
    assert found["clients/accuracy/worst_decile"] <= found["clients/accuracy/mean"]
    assert found["clients/accuracy/std"] == pytest.approx(np.std(drawn))


def test_shards_are_seeded_samples_of_the_clients_own_examples():
    shards = client_shards_of(described(clients=3, client_examples=5), DATA)
    again = client_shards_of(described(clients=3, client_examples=5), DATA)
    assert len(shards) == 3
    for name, shard in shards.items():
        assert len(shard) == 5
        assert set(shard) <= set(DATA.clients[name])
        assert np.array_equal(shard, again[name])
    everybody = client_shards_of(described(), DATA)
    assert all(np.array_equal(everybody[name], indices) for name, indices in DATA.clients.items())
    assert client_shards_of(described(clients=0), DATA) == {}


def test_the_last_round_and_no_other_has_the_scores_of_the_final_model(llama):
    experiment = make_experiment(llama)
    rounds, adapter = finished(experiment)
    prepared = assemble(experiment, DATA)
    executor = LocalExecutor(prepared.spec, DATA, pools_of(experiment))
    host = next(iter(executor._workers.values()))

    assert not any(done.clients or "clients/accuracy/mean" in done.metrics for done in rounds[:-1])
    assert [each.client for each in rounds[-1].clients] == list(DATA.clients)
    for each in rounds[-1].clients:
        own = host.score(pack_adapter(adapter), DATA.clients[each.client], 8)
        assert (each.accuracy, each.num_examples) == (own.correct / own.count, len(DATA.clients[each.client]))
    executor.close()
    assert spread(rounds[-1].clients).items() <= rounds[-1].metrics.items()


def test_scoring_clients_changes_nothing_else(llama):
    with_scores, one = finished(make_experiment(llama))
    without, other = finished(make_experiment(llama, evaluation={"batch_size": 8, "clients": 0}))
    for left, right in zip(with_scores, without, strict=True):
        own = {name: value for name, value in left.metrics.items() if name != "seconds" and "clients/" not in name}
        assert own == {name: value for name, value in right.metrics.items() if name != "seconds"}
    assert all(tensor.equal(other.tensors()[name]) for name, tensor in one.tensors().items())
    assert without[-1].clients == []


def test_the_table_has_a_row_for_every_client_and_the_picture_is_drawn():
    found = scores([0.25, 1.0])
    rows = list(csv.DictReader(io.StringIO(clients_csv(found).decode())))
    assert [(row["client"], float(row["accuracy"])) for row in rows] == [("c0", 0.25), ("c1", 1.0)]
    assert client_accuracy(found).startswith(b"\x89PNG")
    assert client_accuracy(found) != client_accuracy(scores([0.25, 0.5]))
