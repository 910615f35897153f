"""Fed-SB's equations, and that the trainer trains a core and nothing else; its laws are in test_laws.py."""

from dataclasses import replace

import pytest
import torch
from rounds import (
    CLIENTS,
    RANK,
    SCALE,
    SHAPES,
    SMALL,
    apart,
    gaussian,
    mean_product,
    play,
    start,
    take_turn,
)
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.adapter import Factors, orthonormal_bases
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.client import Client
from fedloom.platform.errors import AdapterError
from fedloom.platform.preparation import assemble
from fedloom.platform.received import received_adapter
from fedloom.platform.trainer import train_client


def block_diagonal(C):
    """The obvious way: an (r, r) matrix with the blocks on its diagonal."""
    return torch.block_diag(*C)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_a_core_stands_between_the_factors(blocks):
    pair = Factors(B=gaussian(9, 8), A=gaussian(8, 7, seed=1), C=gaussian(blocks, 8 // blocks, 8 // blocks, seed=2))
    expected = pair.B @ block_diagonal(pair.C) @ pair.A

    torch.testing.assert_close(pair.product(), expected)
    torch.testing.assert_close(pair.folded().B @ pair.folded().A, expected)
    torch.testing.assert_close(sum(pair.blocks([i]).product() for i in range(blocks)), expected)


def test_a_core_that_does_not_fit_is_refused():
    with pytest.raises(AdapterError, match=r"core of shape \(3, 2, 2\) does not fit rank 8"):
        Factors(B=gaussian(9, 8), A=gaussian(8, 7), C=gaussian(3, 2, 2))


def test_bases_are_orthonormal_and_the_same_wherever_they_are_drawn():
    shapes = tuple((name, *shape) for name, shape in SHAPES.items())
    bases = orthonormal_bases(shapes, RANK, 3)
    orthonormal_bases.cache_clear()

    for module, pair in orthonormal_bases(shapes, RANK, 3).items():
        torch.testing.assert_close(pair.B.T @ pair.B, torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        assert torch.equal(pair.B, bases[module].B)
        assert torch.equal(pair.A, bases[module].A)
    with pytest.raises(AdapterError, match=r"'layers.1.v' is 9 x 30 and has no 10 orthonormal directions"):
        orthonormal_bases(shapes, 10, 3)


def test_the_mean_of_the_cores_is_the_mean_of_the_products():
    """Against dense products, in three rounds: C = sum_k p_k C_k, and exactly so in the model."""
    method, state = start("fed_sb")
    for _ in range(3):
        after, turns = play(method, state)
        for module in SHAPES:
            cores = [
                client.num_examples / 60 * turn.trained.factors[module].C
                for client, turn in zip(CLIENTS, turns, strict=True)
            ]
            torch.testing.assert_close(after.slots[f"{module}.C"], sum(cores))
            torch.testing.assert_close(after.adapter.factors[module].product(), mean_product(turns, module))
        state = after


def test_bases_never_travel_and_never_change():
    method, state = start("fed_sb")
    first = take_turn(method, state, SMALL).trained.factors
    for _ in range(2):
        state, turns = play(method, state)
        for turn in turns:
            assert {name.rsplit(".", 1)[-1] for name in turn.payload.tensors} == {"C", "weight", "bias"}
            for module, pair in turn.trained.factors.items():
                assert torch.equal(pair.B, first[module].B)
                assert torch.equal(pair.A, first[module].A)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One client of RAVAN on a real model: what it received, what came of it, and the host."""
    experiment = make_experiment(save_llama(tmp_path_factory.mktemp("llama")), method={"name": "ravan", "heads": 2})
    data = make_data()
    host = AdapterHost(assemble(experiment, data).spec)
    method, state = start("ravan", {"heads": 2}, shapes=host.shapes, rank=4, dtype=torch.float32)
    state = replace(state, adapter=replace(state.adapter, head=host.initial_head(0)))
    state = replace(state, slots={name: gaussian(*t.shape).float() for name, t in state.slots.items()})
    dispatch = take_turn(method, state, Client(id="c0", profile="", rank=4, num_examples=1)).dispatch
    received = received_adapter(dispatch, host.shapes)
    arguments = {"patch": None, "patch_scale": 1.0, "client": "c0", "seed": 1}
    done = train_client(host, data, experiment.training, dispatch=dispatch, received=received, **arguments)
    return host, received, done.adapter


def logits(host):
    with torch.inference_mode():
        return host.model(input_ids=torch.arange(4, 20)[None]).logits


def test_a_worn_core_is_the_folded_pair(trained):
    """On a real model; and a plain adapter that comes after it is worn as if it had not been there."""
    host, received, _ = trained
    folded = replace(received, factors={module: pair.folded() for module, pair in received.factors.items()})
    host.wear(received)
    cored = logits(host)
    host.wear(folded)

    torch.testing.assert_close(cored, logits(host))
    assert apart(host.worn(SCALE).tensors(), folded.tensors()) == 0


def test_training_moves_cores_and_the_head_alone(trained):
    _, received, adapter = trained
    before, after = received.tensors(), adapter.tensors()

    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.endswith((".A", ".B"))


def test_a_run_refuses_nothing(tmp_path):
    for name in ("fed_sb", "ravan"):
        rounds, adapter = finished(make_experiment(save_llama(tmp_path / name), method={"name": name}, rounds=2))
        assert not [record.refused for done in rounds for record in done.records if record.refused]
        assert all(pair.B.any() and pair.C is None for pair in adapter.factors.values())
