"""How the final model serves single clients: scores on their own examples, and their spread."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from small import FIRST_WORD, VOCABULARY, finished, make_data, make_experiment, save_llama

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


def with_held_out(data):
    """Hold out every client's last three examples."""
    return dataclasses.replace(
        data,
        clients={name: examples[:-3] for name, examples in data.clients.items()},
        held_out={name: examples[-3:] for name, examples in data.clients.items()},
    )


def test_clients_are_scored_on_what_was_held_out_of_their_training():
    data = with_held_out(DATA)
    data = dataclasses.replace(data, held_out={**data.held_out, "c1": np.empty(0, np.int64)})
    shards = client_shards_of(described(), data)
    assert list(shards) == [name for name in DATA.clients if name != "c1"], "there is nothing to score c1 on"
    assert all(np.array_equal(shard, data.held_out[name]) for name, shard in shards.items())
    assert [len(shard) for shard in client_shards_of(described(client_examples=2), data).values()] == [2] * 5


def test_held_out_examples_are_never_trained_on(llama):
    """Other tokens in all held-out examples leave every bit of the adapter and change the clients' scores alone."""
    data = with_held_out(DATA)
    tokens = data.input_ids.copy()
    for index in np.concatenate(list(data.held_out.values())):
        example = slice(data.offsets[index], data.offsets[index + 1])
        tokens[example] = FIRST_WORD + (tokens[example] - FIRST_WORD + 7) % (VOCABULARY - FIRST_WORD)
    rounds, one = finished(make_experiment(llama), data)
    changed, other = finished(make_experiment(llama), dataclasses.replace(data, input_ids=tokens))
    _, whole = finished(make_experiment(llama), DATA)

    assert all(tensor.equal(other.tensors()[name]) for name, tensor in one.tensors().items())
    assert not all(tensor.equal(whole.tensors()[name]) for name, tensor in one.tensors().items())
    assert rounds[-1].metrics["eval/loss"] == changed[-1].metrics["eval/loss"]
    assert [each.num_examples for each in rounds[-1].clients] == [3] * 6
    assert all(left.loss != right.loss for left, right in zip(rounds[-1].clients, changed[-1].clients, strict=True))


def test_a_language_model_s_accuracy_is_by_learnt_token(llama):
    """A client's examples of different lengths count by their tokens, not one each."""
    data = make_data(task="causal_lm")
    rounds, adapter = finished(make_experiment(llama, data={"task": "causal_lm"}), data)
    experiment = make_experiment(llama, data={"task": "causal_lm"})
    executor = LocalExecutor(assemble(experiment, data).spec, data, pools_of(experiment))
    host = next(iter(executor._workers.values()))
    for each in rounds[-1].clients:
        parts = [host.score(pack_adapter(adapter), np.array([index]), 1) for index in data.clients[each.client]]
        learnt = sum(part.count for part in parts)
        assert learnt == sum(data.offsets[i + 1] - data.offsets[i] - 1 for i in data.clients[each.client])
        assert each.accuracy == sum(part.correct for part in parts) / learnt
        assert each.loss == pytest.approx(sum(part.loss for part in parts) / learnt, rel=1e-5)
        assert each.num_examples == len(parts)
    executor.close()


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
