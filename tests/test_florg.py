"""FLoRG's equations, and what the trainer does with tied factors; its laws are in test_laws.py."""

from dataclasses import replace

import pytest
import torch
from rounds import CLIENTS, RANK, SCALE, SHAPES, SMALL, exported, gaussian, play, start, take_turn
from small import finished, make_data, make_experiment, save_llama

from fedloom.methods.florg import aligned_root
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.preparation import assemble
from fedloom.platform.received import frozen_factors, received_adapter, ties_of
from fedloom.platform.ties import drawn_ties
from fedloom.platform.trainer import train_client


def dense(tie):
    """L and R as the matrices that are never formed."""
    k = tie.first.shape[1]
    L = torch.zeros(len(tie.rows), k, dtype=torch.float64)
    R = torch.zeros(k, len(tie.columns), dtype=torch.float64)
    L[torch.arange(len(L)), tie.rows] = tie.row_values
    R[tie.columns, torch.arange(R.shape[1])] = tie.column_values
    return L, R


def grams(method, state, turns):
    """The obvious way: sum_k p_k G_k^T G_k by module, from the payloads."""
    old = {module: state.slots[f"{module}.G"] for module in SHAPES}
    return {
        module: sum(
            turn.client.num_examples / 60 * G.T @ G
            for turn in turns
            for G in [old[module] + turn.payload.tensors[f"{module}.G"]]
        )
        for module in SHAPES
    }


@pytest.mark.parametrize(("module", "tie"), drawn_ties(SHAPES, 4, 7).items(), ids=list(SHAPES))
def test_a_tie_is_two_semi_orthogonal_matrices(module, tie):
    """L^T L = R R^T = I; B = L G^T and A = G R; and G is read off A."""
    L, R = dense(tie)
    G = gaussian(*tie.first.shape)

    assert (len(L), R.shape[1]) == SHAPES[module]
    assert G.shape == (4, min(SHAPES[module]))
    torch.testing.assert_close(L.T @ L, torch.eye(L.shape[1]).double())
    torch.testing.assert_close(R @ R.T, torch.eye(len(R)).double())
    torch.testing.assert_close(tie.factor_b(G), L @ G.T)
    torch.testing.assert_close(tie.factor_a(G), G @ R)
    torch.testing.assert_close(tie.untied(tie.factor_a(G)), G)


def test_the_model_is_the_mean_of_gram_matrices_cut_at_the_rank():
    """Against dense matrices: W = L (Q_r - G_0^T G_0) R, Q_r the best of rank r next to sum_k p_k G_k^T G_k."""
    method, state = start("florg")
    ties = drawn_ties(SHAPES, RANK, state.seed)
    for _ in range(2):
        after, turns = play(method, state)
        for module, Q in grams(method, state, turns).items():
            values, vectors = torch.linalg.eigh(Q)
            best = (vectors[:, -RANK:] * values[-RANK:]) @ vectors[:, -RANK:].T
            L, R = dense(ties[module])
            first = ties[module].first.double()
            torch.testing.assert_close(exported(method, after)[module], SCALE * L @ (best - first.T @ first) @ R)
        state = after


def test_before_the_cut_the_mean_of_products_is_exact():
    """Clients of rank 1 whose stack is not higher than r: nothing is cut, and the mean of the products is kept."""
    stack, old = gaussian(3, 9), gaussian(4, 9, seed=1)
    padded = torch.cat([stack, torch.zeros(1, 9).double()])

    G = aligned_root(padded, old)

    torch.testing.assert_close(G.T @ G, stack.T @ stack)


def test_the_new_root_is_the_one_next_to_the_old():
    """No other root of the same Gram matrix lies nearer, neither the one before the turn nor a drawn one."""
    old = gaussian(4, 9)
    stack = torch.cat([old + 0.1 * gaussian(4, 9, seed=seed) for seed in (1, 2, 3)])
    G = aligned_root(stack, old)
    distance = torch.linalg.norm(G - old)
    _, sigma, P = torch.linalg.svd(stack, full_matrices=False)

    assert distance <= torch.linalg.norm(sigma[:4, None] * P[:4] - old)
    for seed in range(20):
        turn = torch.linalg.qr(gaussian(4, 4, seed=seed)).Q
        assert distance <= torch.linalg.norm(turn @ G - old) + 1e-12


def test_a_rotation_of_a_client_s_matrix_changes_nothing():
    """Only G_k^T G_k counts: the gauge of a client is its own affair."""
    method, state = start("florg")
    state, _ = play(method, state)
    turn = take_turn(method, state, SMALL)
    rotated = dict(turn.payload.tensors)
    for module in SHAPES:
        name, old = f"{module}.G", state.slots[f"{module}.G"]
        rotated[name] = torch.linalg.qr(gaussian(RANK, RANK)).Q @ (old + rotated[name]) - old
    other = method.lift(turn.dispatch, replace(turn.payload, tensors=rotated), 10.0)
    models = [exported(method, method.finish(state, partial)) for partial in (turn.partial, other)]

    for module in SHAPES:
        torch.testing.assert_close(*(whole[module] for whole in models))


def test_a_client_trains_one_matrix_and_starts_from_the_server_s_model(tmp_path):
    """On a real model: both factors stay tied through training, G moves, and G_0 is taken off at the start."""
    experiment = make_experiment(save_llama(tmp_path), method={"name": "florg"})
    data = make_data()
    host = AdapterHost(assemble(experiment, data).spec)
    method, state = start("florg", shapes=host.shapes, rank=4, dtype=torch.float32)
    state = replace(state, adapter=replace(state.adapter, head=host.initial_head(0)))
    dispatch = take_turn(method, state, CLIENTS[0]).dispatch
    received, ties, frozen = (f(dispatch, host.shapes) for f in (received_adapter, ties_of, frozen_factors))
    scale = dispatch.scale

    def logits():
        with torch.inference_mode():
            return host.model(input_ids=torch.arange(4, 20)[None]).logits

    host.wear(method.export(state)[0])
    server = logits()
    host.wear(received, patch=frozen, patch_scale=scale, ties=ties)
    torch.testing.assert_close(logits(), server)
    arguments = {"patch": frozen, "patch_scale": scale, "client": "c0", "seed": 1}
    done = train_client(host, data, experiment.training, dispatch=dispatch, received=received, **arguments)
    for module, pair in done.adapter.factors.items():
        G = ties[module].untied(pair.A)
        torch.testing.assert_close(pair.B, ties[module].factor_b(G))
        torch.testing.assert_close(pair.A, ties[module].factor_a(G))
        assert (state.slots[f"{module}.G"] - G).abs().max() > 1e-3
    tied = logits()
    host.wear(done.adapter, patch=frozen, patch_scale=scale)
    torch.testing.assert_close(logits(), tied)  # plain linear layers are back in their places


def test_a_run_refuses_nothing(tmp_path):
    updates = {"max_norm": 100.0, "clip_norm": 1.0}
    experiment = make_experiment(save_llama(tmp_path), method={"name": "florg"}, rounds=2, updates=updates)
    rounds, _ = finished(experiment)

    assert not [record.refused for done in rounds for record in done.records if record.refused]
