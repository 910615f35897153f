"""Clients with models of their own: what is theirs never leaves them, and is scored apart from a global model."""

from dataclasses import replace

import pytest
import torch
from rounds import CLIENTS, LARGE, MIDDLE, SHAPES, SMALL, model, play, start, take_turn, untouched
from small import make_data, make_experiment, save_llama

from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble

PERSONAL = ["fedsa", "local_only"]


def lived(name, cohorts):
    """Play rounds whose clients remember; returns the method, the state, the clients by id and the last turns."""
    method, state = start(name)
    clients = {client.id: client for client in CLIENTS}
    for cohort in cohorts:
        state, turns = play(method, state, [clients[client.id] for client in cohort])
        for turn in turns:
            memory = method.remember(turn.dispatch, turn.trained)
            clients[turn.client.id] = replace(turn.client, memory=memory)
    return method, state, clients, turns


@pytest.mark.parametrize("name", PERSONAL)
def test_a_client_goes_on_from_what_it_kept_however_long_it_was_away(name):
    """B and the head are bit for bit those with which it ended; FedSA's A is the server's newest."""
    method, state, clients, _ = lived(name, [CLIENTS, [MIDDLE], [MIDDLE, LARGE]])
    for client in clients.values():
        before, again = client.memory, take_turn(method, state, client, train=untouched).trained.tensors()
        assert all(torch.equal(again[key], tensor) for key, tensor in before.items())
        if name == "fedsa":
            assert not [key for key in before if key.endswith(".A")]
            assert all(torch.equal(again[f"{m}.A"], pair.A) for m, pair in state.adapter.factors.items())


def test_fedsa_shares_a_alone():
    """What goes up is A; once a client has its B and head, nothing but A comes down either."""
    method, state, clients, turns = lived("fedsa", [CLIENTS, CLIENTS])
    later = take_turn(method, state, clients["small"])

    for payload in (turns[0].payload, later.payload, later.dispatch.payload):
        assert set(payload.tensors) == {f"{module}.A" for module in SHAPES}
        assert not payload.seeds


def test_fedsa_s_server_holds_the_mean_of_a_by_examples():
    _, state, _, turns = lived("fedsa", [CLIENTS, CLIENTS])
    for module, pair in state.adapter.factors.items():
        small, middle, large = (turn.trained.factors[module].A for turn in turns)
        torch.testing.assert_close(pair.A, small / 6 + middle / 2 + large / 3)
        assert not pair.B.any()


def test_alone_nothing_is_sent_but_the_first_head_and_seed():
    method, state, clients, turns = lived("local_only", [CLIENTS, CLIENTS])
    later = take_turn(method, state, clients["large"])

    assert [turn.payload.num_bytes for turn in turns] == [0, 0, 0]
    assert later.dispatch.payload.num_bytes == 0
    assert {id: set(take_turn(method, state, c).trained.ranks.values()) for id, c in clients.items()} == {
        "small": {2},
        "middle": {4},
        "large": {8},
    }


def test_alone_a_client_is_what_it_would_be_without_the_others():
    _, _, together, _ = lived("local_only", [CLIENTS] * 3)
    _, _, alone, _ = lived("local_only", [[SMALL]] * 3)

    assert all(torch.equal(t, alone["small"].memory[n]) for n, t in together["small"].memory.items())


@pytest.mark.parametrize("name", PERSONAL)
def test_a_client_s_own_model_is_what_it_trained_and_a_newcomer_s_is_the_exported_one(name):
    method, state, _, _ = lived(name, [CLIENTS, CLIENTS])
    after, (turn,) = play(method, state, [LARGE])  # the only one, so that the mean A is its own
    own = model(method.personal(after, method.remember(turn.dispatch, turn.trained)))
    new = model(method.personal(after, {}))

    assert all(torch.allclose(own[key], tensor) for key, tensor in model(turn.trained).items())
    assert all(torch.equal(new[key], tensor) for key, tensor in model(method.export(after)[0]).items())


@pytest.mark.parametrize("name", ["local_only", "fedit"])
def test_own_models_are_scored_under_names_of_their_own(tmp_path, name):
    """Each client's model on that client's examples; a global model's scores stay where they are."""
    training = {"learning_rate": 0.02, "batch_size": 8, "steps": 8}
    experiment = make_experiment(save_llama(tmp_path), method={"name": name}, training=training, rounds=2)
    prepared = assemble(experiment, make_data(per_client=24))
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
    shards = prepared.client_shards
    try:
        metrics = list(run(experiment, prepared, executor))[-1].metrics
        if name == "fedit":
            assert not [key for key in metrics if key.startswith("personal/")]
            return
        own = executor.evaluate(list(shards.values()), 8, list(shards))
    finally:
        executor.close()

    expected = sum(score.correct / score.count for score in own) / len(own)
    assert metrics["personal/accuracy/mean"] == pytest.approx(expected)
    assert metrics["personal/accuracy/mean"] > metrics["clients/accuracy/mean"]
