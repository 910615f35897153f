"""FSLoRA's server: the step that it makes of the mean difference, and clients that start from the whole model."""

import pytest
import torch
from rounds import LARGE, MIDDLE, SMALL, apart, exported, play, start, take_turn, untouched, worn

from fedloom.platform.partial import merge


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_server_rate_scales_the_step(rate):
    method, state = start("fslora")
    half, _ = start("fslora", {"server_lr": rate})
    _, turns = play(method, state)
    merged = merge([turn.partial for turn in turns])
    whole, part = method.finish(state, merged).adapter.tensors(), half.finish(state, merged).adapter.tensors()

    for name, old in state.adapter.tensors().items():
        torch.testing.assert_close(part[name] - old, rate * (whole[name] - old))


@pytest.mark.parametrize(
    "options", [{}, {"server_lr": 0.01, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1}], ids=["defaults", "others"]
)
def test_the_server_adamw_is_torchs(options):
    """Five rounds of torch.optim.AdamW on the negative mean difference give the same adapter and head."""
    method, state = start("fslora", {"server_step": "adamw", **options})
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in state.adapter.tensors().items()}
    arguments = {"lr": options.get("server_lr", 3e-4)}
    if options:
        arguments |= {"betas": (options["beta1"], options["beta2"]), "weight_decay": options["weight_decay"]}
    reference = torch.optim.AdamW(parameters.values(), **arguments)
    for _ in range(5):
        after, turns = play(method, state)
        merged = merge([turn.partial for turn in turns])
        for name, parameter in parameters.items():
            parameter.grad = -merged.sums[name] / 3
        reference.step()
        state = after

    for name, tensor in state.adapter.tensors().items():
        torch.testing.assert_close(tensor, parameters[name].detach(), rtol=1e-12, atol=1e-14)


def test_adamw_moves_what_nobody_touched():
    """Momentum and decay act on every coordinate, drawn or not; plain averaging leaves those alone."""
    for step, moves in (("adamw", True), ("avg", False)):
        method, state = start("fslora", {"server_step": step})
        state, _ = play(method, state)
        after, _ = play(method, state, train=untouched)
        assert (apart(after.adapter.tensors(), state.adapter.tensors()) > 1e-9) == moves


def test_differences_are_taken_in_float32_at_least():
    """Clients may train in bfloat16; r / k amplifies what a difference taken there would round away."""
    method, state = start("fslora", dtype=torch.bfloat16)
    turn = take_turn(method, state, SMALL)
    old, new = turn.dispatch.payload.tensors["layers.0.q.A"], turn.trained.factors["layers.0.q"].A

    assert {old.dtype, new.dtype} == {torch.bfloat16}
    assert {tensor.dtype for tensor in turn.payload.tensors.values()} == {torch.float32}
    assert torch.equal(turn.payload.tensors["layers.0.q.A"], new.float() - old.float())


@pytest.mark.parametrize("client", [SMALL, MIDDLE, LARGE], ids=lambda client: client.id)
def test_with_the_rest_frozen_a_client_starts_from_the_whole_model(client):
    """What it trains and what is frozen beside it are together the server's product, at the server's scale."""
    method, state = start("fslora", {"rest": "frozen"})
    state, _ = play(method, state)
    turn = take_turn(method, state, client, train=untouched)

    assert turn.trained.scale == state.adapter.scale
    assert set(turn.trained.ranks.values()) == {client.rank}
    assert apart(worn(turn, None), exported(method, state)) < 1e-12


def test_with_the_rest_frozen_changes_are_scattered_and_divided_by_all():
    method, state = start("fslora", {"rest": "frozen"})
    state, _ = play(method, state)
    after, turns = play(method, state)
    for module, old in state.adapter.factors.items():
        expected = old.B.clone()
        for turn in turns:
            index = list(turn.dispatch.trained[module])
            expected[:, index] += (turn.trained.factors[module].B - old.B[:, index]) / 3
        torch.testing.assert_close(after.adapter.factors[module].B, expected)
