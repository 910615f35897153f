"""FLASC: the largest entries of all tensors together, and a server that divides by everybody."""

from dataclasses import replace

import pytest
import torch
from rounds import LARGE, RANK, SHAPES, SMALL, apart, exported, gaussian, play, start, take_turn, untouched
from small import finished, make_experiment, save_llama

from fedloom.methods.flasc import sparse
from fedloom.platform.received import expanded, received_adapter
from fedloom.platform.updates import refusal
from fedloom.platform.wire import pack_payload, unpack_payload


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 1.0])
def test_the_largest_entries_of_all_tensors_are_sent_and_put_back(density):
    """floor(q n) of them, at least one: none that is left out is larger than one that is sent."""
    tensors = {"one.B": gaussian(7, 3), "one.A": 5 * gaussian(3, 9), "head.w": gaussian(4)}
    payload = sparse(tensors, density)
    full = expanded(unpack_payload(pack_payload(payload)))

    n = 7 * 3 + 3 * 9 + 4
    kept = torch.cat([full[name].flatten() != 0 for name in tensors])
    sizes = torch.cat([tensor.abs().flatten() for tensor in tensors.values()])
    assert kept.sum() == max(1, int(density * n)) == sum(tensor.numel() for tensor in payload.tensors.values())
    assert density == 1 or sizes[kept].min() >= sizes[~kept].max()
    assert all(torch.equal(full[name][full[name] != 0], tensors[name][full[name] != 0]) for name in tensors)
    assert bool(payload.masks) == (density < 1)


def test_a_client_trains_every_entry_from_the_sparse_start():
    method, state = start("flasc", {"density_down": 0.2})
    state, _ = play(method, state)
    turn = take_turn(method, state, SMALL)
    received = received_adapter(turn.dispatch, SHAPES).tensors()
    n = sum(tensor.numel() for tensor in received.values())

    assert sum(int((tensor != 0).sum()) for tensor in received.values()) == int(0.2 * n)
    assert all((tensor != received[name]).all() for name, tensor in turn.trained.tensors().items())
    assert turn.dispatch.rank == RANK


def test_the_server_takes_torch_s_adamw_step_along_the_mean_over_everybody():
    """The mean of the sparse changes, formed densely and divided by three wherever they come from."""
    method, state = start("flasc", {"density_up": 0.1, "server_lr": 0.01, "weight_decay": 0.1})
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.adapter.tensors().items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for _ in range(3):
        after, turns = play(method, state)
        for name, parameter in theirs.items():
            parameter.grad = torch.zeros_like(parameter)
            for turn in turns:
                change = turn.trained.tensors()[name] - state.adapter.tensors()[name]
                parameter.grad -= torch.where(turn.payload.masks[name], change, 0.0) / 3
        optimizer.step()
        for name, tensor in after.adapter.tensors().items():
            torch.testing.assert_close(tensor, theirs[name].detach())
        state = after


def test_dense_messages_are_fedopt_s_adamw():
    """At density 1 and equal numbers of examples, nothing but AdamW is left."""
    cohort = [replace(LARGE, id=name) for name in ("one", "other")]
    models = []
    for name, options in (("flasc", {}), ("fedopt", {"optimizer": "adamw", "beta2": 0.999})):
        method, state = start(name, options)
        for _ in range(3):
            state, _ = play(method, state, cohort)
        models.append(exported(method, state))

    assert apart(*models) < 1e-9


def test_without_training_and_decay_the_first_round_changes_nothing():
    method, state = start("flasc")
    after, _ = play(method, state, train=untouched)

    assert apart(exported(method, after), exported(method, state)) == 0


def test_masks_that_do_not_fit_are_refused():
    """Where entries lie is the client's to say; how many, and in what, is not."""
    method, state = start("flasc", {"density_up": 0.2})
    turn = take_turn(method, state, LARGE)
    expected = method.upload(turn.dispatch, received_adapter(turn.dispatch, SHAPES))
    name = "layers.0.q.B"
    masks, mask = turn.payload.masks, turn.payload.masks[name]
    assert refusal(turn.payload, expected, 0.0) is None
    for wrong in (torch.ones_like(mask), mask.flatten(), mask[:-1]):
        found = refusal(replace(turn.payload, masks={**masks, name: wrong}), expected, 0.0)
        assert found is not None
        assert found.kind in {"shape", "size"}
    more = sparse({n: t.float() for n, t in turn.trained.tensors().items()}, 0.5)
    assert refusal(more, expected, 0.0).kind in {"size", "dtype"}


def test_sparse_messages_are_trained_clipped_and_charged(llama):
    """A run with both directions sparse: no honest update is refused, and a tight bound holds the model still."""
    method = {"name": "flasc", "density_down": 0.5, "density_up": 0.1}
    rounds, _ = finished(make_experiment(llama, rounds=2, method=method, updates={"clip_norm": 1e-12}))

    assert not [record for done in rounds for record in done.records if record.refused]
    assert rounds[2].metrics["bytes/up"] < 0.3 * rounds[2].metrics["bytes/down"]
    assert rounds[2].metrics["eval/loss"] == pytest.approx(rounds[0].metrics["eval/loss"], abs=1e-3)
