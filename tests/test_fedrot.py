"""FedRot-LoRA: products stay, and what differs by a rotation alone is averaged exactly."""

import pytest
import torch
from rounds import CLIENTS, RANK, apart, exported, gaussian, play, start, take_turn, untouched

from fedloom.methods.fedrot import nearest
from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.partial import merge


def later(options=None, rounds=1):
    method, state = start("fedrot", options)
    for _ in range(rounds):
        state, _ = play(method, state)
    return method, state


def sent(turn):
    return Adapter.from_tensors(turn.payload.tensors, 1.0).factors


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"reflections": True}], ids=str)
def test_products_are_those_of_training(options, rounds):
    method, state = later(options, rounds)
    for client in CLIENTS:
        turn = take_turn(method, state, client)
        for module, own in turn.trained.factors.items():
            torch.testing.assert_close(sent(turn)[module].product(), own.product())


@pytest.mark.parametrize(("rounds", "factor"), [(1, "B"), (2, "A"), (3, "B")])
def test_the_factors_take_turns_at_being_aligned_and_no_rotation_aligns_better(rounds, factor):
    method, state = later(rounds=rounds)
    turn = take_turn(method, state, CLIENTS[0])
    for module, found in sent(turn).items():
        wanted = getattr(state.adapter.factors[module], factor)
        own = turn.trained.factors[module]

        def distance(R, own=own, wanted=wanted):
            return float(torch.linalg.norm((own.B @ R if factor == "B" else R.T @ own.A) - wanted))

        best = float(torch.linalg.norm(getattr(found, factor) - wanted))
        tries = [nearest(gaussian(RANK, RANK, seed=seed), reflections=False) for seed in range(20)]
        R = method.rotation(own, state.adapter.factors[module], by_rows=factor == "A")
        tries += [nearest(R + 0.05 * gaussian(RANK, RANK, seed=seed), reflections=False) for seed in range(20)]
        assert all(distance(other) >= best - 1e-12 for other in tries)
        assert distance(torch.eye(RANK, dtype=torch.float64)) > best


def test_the_first_round_and_a_strength_of_zero_are_fedit():
    models = {}
    for name, options in (("fedrot", {"strength": 0.0}), ("fedit", {})):
        method, state = start(name, options)
        models[name] = []
        for _ in range(3):
            state, _ = play(method, state)
            models[name].append(exported(method, state))

    assert apart(models["fedrot"][0], models["fedit"][0]) == 0
    assert max(apart(a, b) for a, b in zip(models["fedrot"], models["fedit"], strict=True)) < 1e-12


def gauge(seed):
    return nearest(gaussian(RANK, RANK, seed=seed), reflections=False)


@pytest.mark.parametrize("rounds", [1, 2])
def test_one_update_in_rotated_gauges_is_averaged_exactly(rounds):
    """All clients learn the same product; each writes it in its own basis. FedIT is far off."""

    def train(received, dispatch, client, number):
        R = gauge(client.rank)
        pairs = {
            m: Factors(B=(p.B + 0.1 * gaussian(*p.B.shape)) @ R, A=R.T @ (p.A + 0.1 * gaussian(*p.A.shape)))
            for m, p in received.factors.items()
        }
        return Adapter(factors=pairs, head=received.head, scale=received.scale)

    apart_by_name = {}
    for name in ("fedrot", "fedit"):
        method, state = start(name)
        for _ in range(rounds):
            state, _ = play(method, state)
        after, turns = play(method, state, train=train)
        alone = method.finish(state, merge([turns[0].partial]))
        apart_by_name[name] = apart(exported(method, after), exported(method, alone))

    assert apart_by_name["fedrot"] < 1e-10
    assert apart_by_name["fedit"] > 0.1


def test_the_paper_s_rotations_do_not_reflect_and_the_code_s_may():
    mirrored = torch.diag(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    proper, any_of_them = (nearest(mirrored, reflections=allowed) for allowed in (False, True))

    torch.testing.assert_close(any_of_them, torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)))
    assert torch.linalg.det(proper) > 0
    torch.testing.assert_close(proper @ proper.T, torch.eye(3, dtype=torch.float64))
    assert (proper * mirrored).sum() == pytest.approx(4)  # -1 + 2 + 3: the smallest singular value pays


def test_a_client_that_has_not_trained_sends_what_it_got():
    for rounds in (1, 2):
        method, state = later(rounds=rounds)
        turn = take_turn(method, state, CLIENTS[0], train=untouched)
        assert apart(turn.payload.tensors, turn.trained.tensors()) < 1e-10
