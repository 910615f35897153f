"""Server optimisers over the mean change: against the formulas entry by entry, and against torch's own."""

import math

import pytest
import torch
from rounds import apart, exported, play, start


def changes(state, turns):
    """Return sum_k p_k theta_k - theta for 10, 30 and 20 of 60 examples."""
    old = state.adapter.tensors()
    shares = (1 / 6, 1 / 2, 1 / 3)
    return {
        name: sum(p * turn.trained.tensors()[name] for p, turn in zip(shares, turns, strict=True)) - tensor
        for name, tensor in old.items()
    }


def test_without_momentum_fedavgm_is_fedit():
    models = []
    for name, options in (("fedavgm", {"beta": 0.0}), ("fedit", {})):
        method, state = start(name, options)
        for _ in range(3):
            state, _ = play(method, state)
        models.append(exported(method, state))

    assert apart(*models) < 1e-12


def test_fedavgm_adds_a_running_mean_that_begins_with_the_first_change():
    method, state = start("fedavgm", {"beta": 0.7})
    running = None
    for _ in range(3):
        after, turns = play(method, state)
        change = changes(state, turns)
        running = change if running is None else {n: 0.7 * running[n] + 0.3 * change[n] for n in change}
        for name, tensor in state.adapter.tensors().items():
            torch.testing.assert_close(after.adapter.tensors()[name], tensor + running[name])
        state = after


def second_moment(optimizer, v, change):
    """One entry, in plain numbers."""
    if optimizer == "adagrad":
        return v + change**2
    if optimizer == "yogi":
        return v - 0.01 * change**2 * (1 if v > change**2 else -1)
    return 0.99 * v + 0.01 * change**2


@pytest.mark.parametrize("optimizer", ["adam", "yogi", "adagrad"])
def test_adaptive_steps_are_those_of_the_paper_entry_by_entry(optimizer):
    method, state = start("fedopt", {"optimizer": optimizer})
    name = "layers.0.q.B"
    entries = [(0, 0), (3, 5), (17, 7)]
    moments = dict.fromkeys(entries, (0.0, 1e-6))
    for _ in range(3):
        after, turns = play(method, state)
        change = changes(state, turns)[name]
        for entry in entries:
            m, v = moments[entry]
            d = float(change[entry])
            m, v = 0.9 * m + 0.1 * d, second_moment(optimizer, v, d)
            moments[entry] = (m, v)
            expected = float(state.adapter.tensors()[name][entry]) + 1e-3 * m / (math.sqrt(v) + 1e-3)
            assert float(after.adapter.tensors()[name][entry]) == pytest.approx(expected, rel=1e-12)
        state = after


def test_adamw_is_torch_s():
    options = {"optimizer": "adamw", "server_lr": 0.01, "beta2": 0.95, "weight_decay": 0.1}
    method, state = start("fedopt", options)
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.adapter.tensors().items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        after, turns = play(method, state)
        for name, change in changes(state, turns).items():
            theirs[name].grad = -change
        optimizer.step()
        for name, tensor in after.adapter.tensors().items():
            torch.testing.assert_close(tensor, theirs[name].detach())
        state = after
