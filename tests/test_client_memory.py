"""What clients keep between rounds: theirs alone, free of charge, and gone with nobody but a refused update."""

from dataclasses import replace

import pytest
import torch
from rounds import frozen_copy, leaves, play, same_bits, start, take_turn
from small import PRUNING, make_data, make_experiment, save_llama

from fedloom.platform import worker as worker_module
from fedloom.platform.client import Budget
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.method import Payload
from fedloom.platform.population import chunks_of, pools_of
from fedloom.platform.preparation import assemble, world_of
from fedloom.platform.received import received_adapter
from fedloom.platform.registry import build_method, method_class, method_names
from fedloom.platform.server import Server
from fedloom.platform.updates import pruned_like, refusal
from fedloom.platform.wire import memories_in, memory_tensors, pack, pack_partial, unpack

DATA = make_data()
REMEMBERING = [name for name in method_names() if method_class(name).traits.memory]
REMEMBERS_WITH = {"soft": {"aggregation": "error_feedback"}}  # by default its clients keep nothing
MEMORY = {"ranks": torch.full((4,), 1)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def served(llama):
    """A server before the first round, the chunk of one client, and that client's untrained update."""
    experiment = make_experiment(llama, method=PRUNING)
    prepared = assemble(experiment, DATA)
    chunk = chunks_of(experiment, world_of(experiment, prepared).open(1).tasks)[0]
    server = Server()
    server.begin(experiment, prepared.shapes, 4, pack({"score.weight": torch.zeros(3, 16)}), "run")
    (task,) = chunk.tasks
    method = build_method("hetlora", {})
    dispatch = method.dispatch(server._state, task.client, task.budget, torch.Generator())
    return server, chunk, method.lift(dispatch, method.upload(dispatch, received_adapter(dispatch, {})), 3.0)


def memories(server):
    return memories_in(server.snapshot().state)


def test_a_memory_counts_after_the_round_and_comes_with_the_next_dispatch(served):
    """A chunk that is trained twice in one round gets the same dispatch, and the same bits, both times."""
    server, chunk, partial = served
    (client,) = (task.client.id for task in chunk.tasks)
    before = server.dispatch(chunk).clients[0]

    server.fold(0, pack_partial(partial, {client: MEMORY}, run="run", round=0))
    again = server.dispatch(chunk).clients[0]
    server.finish(1)
    after = server.dispatch(chunk).clients[0]

    assert before.memory is None
    assert again == before
    assert torch.equal(unpack(after.memory)["ranks"], MEMORY["ranks"])
    assert after.header["rank"] == 1
    assert after.bytes_down == 4 * sum(t.numel() for t in unpack(server.dispatch(chunk).payloads[0]).values())
    assert not after.client.memory  # it is told apart from what the server knows of a client


def test_what_is_stale_or_double_changes_no_memory(served):
    server, chunk, partial = served
    (client,) = (task.client.id for task in chunk.tasks)
    server.fold(0, pack_partial(partial, {client: MEMORY}, run="run", round=3))
    server.fold(0, pack_partial(partial, {client: MEMORY}, run="other", round=0))
    server.fold(0, pack_partial(partial, run="run", round=0))
    server.fold(0, pack_partial(partial, {client: MEMORY}, run="run", round=0))
    server.finish(1)

    assert memories(server) == {}


def test_a_client_that_takes_no_part_keeps_what_it_had(served):
    server, _, partial = served
    for kept in ({"one": MEMORY, "other": {"x": torch.ones(2)}}, {"one": {"y": torch.zeros(1)}}):
        number = server.snapshot().state.meta["round"]
        server.fold(0, pack_partial(partial, kept, run="run", round=number))
        server.finish(1)

    assert {client: list(memory) for client, memory in memories(server).items()} == {"one": ["y"], "other": ["x"]}


def test_a_snapshot_has_all_memories(served):
    server, _, partial = served
    server.fold(0, pack_partial(partial, {"a/b": MEMORY, "memory/0": {"m.B": torch.rand(3, 2)}}, run="run", round=0))
    server.finish(1)
    snapshot = server.snapshot()
    server.fold(0, pack_partial(partial, {"a/b": {"x": torch.ones(1)}}, run="run", round=1))
    server.finish(1)
    server.restore(snapshot)

    assert memories(server).keys() == {"a/b", "memory/0"}
    left, right = unpack(server.snapshot().state), unpack(snapshot.state)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def remembered(llama, monkeypatch, spoil=None, **changes):
    """Run with pruning; returns the records by round, and the memories afterwards."""
    experiment = make_experiment(llama, **{"method": PRUNING, "rounds": 4, **changes})
    prepared = assemble(experiment, DATA)
    executor = LocalExecutor(prepared.spec, DATA, pools_of(experiment))
    with monkeypatch.context() as patched:
        if spoil is not None:
            patched.setattr(worker_module, "train_client", spoil(worker_module.train_client))
        try:
            rounds = list(run(experiment, prepared, executor))
            return rounds, memories(executor._server)
        finally:
            executor.close()


def test_clients_prune_themselves_and_send_less(llama, monkeypatch):
    rounds, kept = remembered(llama, monkeypatch)
    ranks = {client: memory["ranks"].tolist() for client, memory in kept.items()}
    first, last = ({r.client: r for r in done.records} for done in (rounds[1], rounds[-1]))

    assert not [record.refused for done in rounds for record in done.records if record.refused]
    assert any(set(own) == {1} for own in ranks.values())
    assert all(
        last[c].bytes_down < first[c].bytes_down for c in last.keys() & first.keys() if last[c].rank < first[c].rank
    )
    assert min(record.rank for record in last.values()) < min(record.rank for record in first.values())


def test_a_refused_update_leaves_the_memory_as_it_was(llama, monkeypatch):
    """One client's training always ends with NaN: nothing of it is kept, whatever it has pruned."""

    def spoil(real):
        def training(*args, **settings):
            done = real(*args, **settings)
            return replace(done, loss=float("nan")) if settings["client"] == "c2" else done

        return training

    rounds, kept = remembered(llama, monkeypatch, spoil)

    assert {r.client for done in rounds for r in done.records if r.refused} == {"c2"}
    assert "c2" not in kept
    assert len(kept) > 2


def test_methods_without_memory_never_see_it(llama, monkeypatch):
    assert remembered(llama, monkeypatch, method={"name": "fedit"})[1] == {}


@pytest.mark.parametrize("name", method_names())
def test_a_method_remembers_if_it_says_so_and_has_models_of_clients_own_only_then(name):
    kind = method_class(name)

    assert bool(kind.traits.memory) == hasattr(kind, "remember")
    assert kind.traits.personal == hasattr(kind, "personal") <= bool(kind.traits.memory)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_memory_is_tensors_that_travel_and_remembering_changes_nothing(name):
    """The same bits each time, after a trip through a packet too, and the payload is no other for it."""
    method, state = start(name, REMEMBERS_WITH.get(name), dtype=torch.float32)
    state, turns = play(method, state)
    for turn in turns:
        before = frozen_copy(turn)
        memory = method.remember(turn.dispatch, turn.trained)
        there = memories_in(pack(*memory_tensors({turn.client.id: memory})))[turn.client.id]
        assert memory
        assert same_bits(leaves(memory), leaves(there))
        assert same_bits(leaves(memory), leaves(method.remember(turn.dispatch, turn.trained)))
        assert same_bits(before, leaves(turn))
        again = take_turn(method, state, replace(turn.client, memory=there))
        assert again.payload.num_bytes <= turn.payload.num_bytes


def test_fewer_directions_are_taken_from_a_method_that_prunes_and_more_from_nobody(served):
    server, chunk, _ = served
    (task,) = chunk.tasks
    method = build_method("hetlora", {})
    dispatch = method.dispatch(server._state, task.client, Budget(rank=3), torch.Generator())
    received = received_adapter(dispatch, {})
    expected = method.upload(dispatch, received)

    def found(payload):
        _, wanted = pruned_like(payload, received, expected)
        return refusal(payload, wanted, 0.0)

    assert found(Payload(tensors=received.first(2).tensors())) is None
    assert found(Payload(tensors=received.first(0).tensors())).kind == "shape"
    module = next(iter(received.factors))
    for factor in "BA":  # whatever is sent in a factor's place is refused, and raises nothing
        stranger = Payload(tensors=received.tensors() | {f"{module}.{factor}": torch.ones(())})
        assert found(stranger).kind in {"shape", "size"}
    assert found(Payload(tensors=server._state.adapter.tensors())).kind == "size"
    assert refusal(Payload(tensors=received.first(2).tensors()), expected, 0.0).kind == "shape"
