"""Fed-PLoRA: clients start from the server's model, train some of its pairs, and each pair is its trainers' mean."""

import pytest
import torch
from rounds import CLIENTS, LARGE, RANK, SHAPES, SMALL, apart, exported, play, start, take_turn, untouched
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.errors import AdapterError
from fedloom.platform.preparation import assemble
from fedloom.platform.received import frozen_factors, received_adapter
from fedloom.platform.wire import dispatch_from, dispatch_header


def test_what_is_trained_and_what_is_frozen_are_the_server_s_model_together():
    method, state = start("fed_plora")
    state, _ = play(method, state)
    for client in CLIENTS:
        turn = take_turn(method, state, client, train=untouched)
        frozen = frozen_factors(turn.dispatch, SHAPES)
        assert set(turn.trained.ranks.values()) == {client.rank}
        assert bool(frozen) == (client.rank < RANK)
        for module, own in turn.trained.factors.items():
            rest = frozen[module].product() if frozen else 0.0
            torch.testing.assert_close(own.product() + rest, state.adapter.factors[module].product())


def test_each_pair_is_the_mean_over_those_who_trained_it():
    """Entry by entry, and a pair that nobody trained stays bit for bit."""
    method, state = start("fed_plora")
    state, _ = play(method, state)
    after, turns = play(method, state, [SMALL, CLIENTS[1]])
    untrained = 0
    for module, pair in after.adapter.factors.items():
        old = state.adapter.factors[module]
        for j in range(RANK):
            mine = [t for t in turns if j in t.dispatch.trained[module]]
            if not mine:
                untrained += 1
                assert torch.equal(pair.B[:, j], old.B[:, j])
                assert torch.equal(pair.A[j], old.A[j])
                continue
            total = sum(t.client.num_examples for t in mine)
            B = A = 0.0
            for t in mine:
                place, own = t.dispatch.trained[module].index(j), t.trained.factors[module]
                B = B + t.client.num_examples / total * own.B[:, place]
                A = A + t.client.num_examples / total * own.A[place]
            torch.testing.assert_close(pair.B[:, j], B)
            torch.testing.assert_close(pair.A[j], A)
    assert untrained >= 2 * len(SHAPES)  # six of eight pairs at most were trained


def test_clients_that_train_all_pairs_are_fedit():
    cohort = [type(c)(id=c.id, profile=c.profile, rank=RANK, num_examples=c.num_examples) for c in CLIENTS]
    models = []
    for name in ("fed_plora", "fedit"):
        method, state = start(name)
        for _ in range(2):
            state, _ = play(method, state, cohort)
        models.append(exported(method, state))

    assert apart(*models) < 1e-12


def test_pairs_are_drawn_anew_by_round_client_and_module_and_travel():
    method, state = start("fed_plora")
    drawn = set()
    for _ in range(4):
        for client in CLIENTS[:2]:
            dispatch = take_turn(method, state, client).dispatch
            assert dispatch_from(dispatch_header(dispatch), dispatch.payload).trained == dispatch.trained
            drawn |= {(client.id, pairs) for pairs in dispatch.trained.values()}
        state, _ = play(method, state)

    assert len(drawn) > 12


def test_a_rank_that_the_server_does_not_have_is_refused():
    method, state = start("fed_plora", rank=4)

    with pytest.raises(AdapterError, match=r"has rank 8, .* rank 4"):
        take_turn(method, state, LARGE)


def test_a_client_s_model_gives_the_server_s_logits_before_it_trains(tmp_path):
    """On a real model: the pairs that it does not train are worn beside those that it does, for this client alone."""
    experiment = make_experiment(save_llama(tmp_path), method={"name": "fed_plora"})
    prepared = assemble(experiment, make_data())
    host = AdapterHost(prepared.spec)
    method, state = start("fed_plora", shapes=host.shapes, rank=4, dtype=torch.float32)
    head = {name: tensor.float() for name, tensor in host.initial_head(0).items()}
    state, _ = play(method, state, [SMALL, CLIENTS[1]])
    adapter = type(state.adapter)(factors=state.adapter.factors, head=head, scale=state.adapter.scale)
    tokens = torch.arange(4, 20)[None]

    def logits():
        with torch.inference_mode():
            return host.model(input_ids=tokens).logits

    host.wear(adapter)
    server = logits()
    dispatch = take_turn(method, state, SMALL).dispatch
    received = received_adapter(dispatch, host.shapes)
    received = type(received)(factors=received.factors, head=head, scale=received.scale)
    host.wear(received, patch=frozen_factors(dispatch, host.shapes), patch_scale=received.scale)
    client = logits()
    host.wear(received)

    torch.testing.assert_close(client, server)
    assert not torch.allclose(logits(), server)  # without them it is another model, and nothing of them has stayed


def test_a_run_refuses_nothing(tmp_path):
    rounds, _ = finished(make_experiment(save_llama(tmp_path), method={"name": "fed_plora"}, rounds=2))

    assert not [record.refused for done in rounds for record in done.records if record.refused]
    assert {record.rank for record in rounds[-1].records} <= {2.0, 4.0}
