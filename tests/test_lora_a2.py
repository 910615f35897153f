"""LoRA-A2's equations, and the first pass from which a client chooses; its laws are in test_laws.py."""

from dataclasses import replace

import pytest
import torch
from rounds import CLIENTS, LARGE, MIDDLE, RANK, SHAPES, SMALL, apart, exported, noise, play, start, take_turn
from small import finished, make_experiment, save_llama

from fedloom.platform import worker as worker_module
from fedloom.platform.client import Budget
from fedloom.platform.method import Payload
from fedloom.platform.received import frozen_factors, received_adapter
from fedloom.platform.updates import refusal

ROUNDS = [(0, "B"), (1, "A")]


def after(rounds):
    method, state = start("lora_a2")
    for _ in range(rounds):
        state, _ = play(method, state)
    return method, state


def scores(dispatch, probed, turn):
    """The obvious way, one pair at a time: {(module, i): g_i}."""
    found = {}
    for module in SHAPES:
        old_B, old_A = (dispatch.payload.tensors[f"{module}.{name}"] for name in "BA")
        pair = probed.factors[module]
        for i in range(RANK):
            B = pair.B[:, i] - old_B[:, i] if turn == "B" else old_B[:, i]
            A = pair.A[i] - old_A[i] if turn == "A" else old_A[i]
            found[module, i] = float(B.norm() * A.norm())
    return found


@pytest.mark.parametrize(("rounds", "turn"), ROUNDS)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.id)
def test_the_ranks_that_changed_most_are_chosen_over_the_whole_model(rounds, turn, client):
    method, state = after(rounds)
    sent = method.dispatch(state, client, Budget(rank=client.rank), torch.Generator())
    probed = noise(received_adapter(sent, SHAPES), sent, client, 0)
    chosen = method.choose(sent, probed).trained
    found = scores(sent, probed, turn)
    best = sorted(found, key=found.get, reverse=True)[: client.rank * len(SHAPES)]

    assert sent.trainable == {turn, "head"}
    assert {(module, i) for module, ranks in chosen.items() for i in ranks} == set(best)
    assert sum(map(len, chosen.values())) == client.rank * len(SHAPES)
    assert all(list(ranks) == sorted(ranks) for ranks in chosen.values())


@pytest.mark.parametrize(("rounds", "turn"), ROUNDS)
def test_the_server_adds_the_mean_change_and_what_nobody_chose_keeps_its_bits(rounds, turn):
    method, state = after(rounds)
    cohort = [SMALL, MIDDLE]
    new, turns = play(method, state, cohort)
    untouched = 0
    for module in SHAPES:
        was, now = state.adapter.factors[module], new.adapter.factors[module]
        side, other = (getattr(was, name) for name in (turn, "AB".replace(turn, "")))
        assert torch.equal(getattr(now, "AB".replace(turn, "")), other)
        for i in range(RANK):
            at = (slice(None), i) if turn == "B" else i
            expected = side[at].clone()
            for done in turns:
                chosen = done.dispatch.trained[module]
                if i in chosen:
                    place = (slice(None), chosen.index(i)) if turn == "B" else chosen.index(i)
                    share = done.client.num_examples / 40
                    expected += share * (getattr(done.trained.factors[module], turn)[place] - side[at])
            torch.testing.assert_close(getattr(now, turn)[at], expected)
            if all(i not in done.dispatch.trained[module] for done in turns):
                untouched += 1
                assert torch.equal(getattr(now, turn)[at], side[at])
    assert untouched


def test_clients_that_train_all_ranks_are_rolora():
    cohort = [replace(client, rank=RANK) for client in CLIENTS]
    models = []
    for name in ("lora_a2", "rolora"):
        method, state = start(name)
        for _ in range(3):
            state, _ = play(method, state, cohort)
        models.append(exported(method, state))

    assert apart(*models) < 1e-12


def test_the_rest_is_frozen_beside_what_is_chosen():
    """A client starts from exactly the server's model."""
    method, state = after(2)
    dispatch = take_turn(method, state, SMALL).dispatch
    received, frozen = received_adapter(dispatch, SHAPES), frozen_factors(dispatch, SHAPES)

    for module, pair in received.factors.items():
        torch.testing.assert_close(pair.product() + frozen[module].product(), state.adapter.factors[module].product())


@pytest.mark.parametrize(("rounds", "turn"), ROUNDS)
def test_an_update_with_another_number_of_ranks_than_its_mask_says_is_refused(rounds, turn):
    method, state = after(rounds)
    done = take_turn(method, state, LARGE)
    module = next(iter(SHAPES))
    masks = {**done.payload.masks, module: done.payload.masks[module].clone().index_fill(0, torch.tensor([0]), False)}

    assert refusal(done.payload, done.payload, 0.0) is None
    problem = refusal(Payload(tensors=done.payload.tensors, masks=masks), done.payload, 0.0)
    assert problem.reason == f"the mask of {module!r} names 7 ranks of 8"


def test_a_client_makes_one_pass_before_it_chooses(tmp_path, monkeypatch):
    """On a real model: the pass starts where training starts, goes once over the examples, and nothing is refused."""
    calls = []
    real = worker_module.train_client

    def watched(host, data, settings, **given):
        calls.append((given["client"], settings.steps, settings.epochs, given["seed"], given["dispatch"].trained))
        return real(host, data, settings, **given)

    monkeypatch.setattr(worker_module, "train_client", watched)
    rounds, _ = finished(make_experiment(save_llama(tmp_path), method={"name": "lora_a2"}, rounds=2))

    assert not [record.refused for done in rounds for record in done.records if record.refused]
    assert len(calls) == 2 * sum(len(done.records) for done in rounds)
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert first[:3] == (second[0], None, 1.0)
        assert first[3] != second[3]
        assert not first[4]
        assert sum(map(len, second[4].values())) in {2 * 4, 4 * 4}  # r_k ranks times four modules
