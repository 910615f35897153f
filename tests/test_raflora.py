"""raFLoRA: partitions of the mean product over their holders."""

from dataclasses import replace
from itertools import pairwise

import torch
from rounds import CLIENTS, MIDDLE, RANK, SMALL, apart, exported, play, start, take_turn, untouched

LEVELS = (0, 2, 4, 8)  # of the three clients


def by_partition(turns, module, shape):
    """W = sum over partitions (l, h] of the holders' mean product, formed in full."""
    W = torch.zeros(shape, dtype=torch.float64)
    for low, high in pairwise(LEVELS):
        holders = [turn for turn in turns if turn.client.rank >= high]
        examples = sum(turn.client.num_examples for turn in holders)
        for turn in holders:
            own = turn.trained.factors[module]
            W += turn.client.num_examples / examples * own.B[:, low:high] @ own.A[low:high]
    return W


def test_the_model_is_the_best_approximation_of_the_partitioned_mean():
    """And its singular values are shared by both factors: B^T B = A A^T = diag(sigma)."""
    method, state = start("raflora")
    for _ in range(2):
        state, turns = play(method, state)

    for module, pair in state.adapter.factors.items():
        U, sigma, Vt = torch.linalg.svd(by_partition(turns, module, pair.product().shape), full_matrices=False)
        torch.testing.assert_close(pair.product(), (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK])
        for gram in (pair.B.T @ pair.B, pair.A @ pair.A.T):
            torch.testing.assert_close(gram, torch.diag(sigma[:RANK]), atol=1e-10, rtol=1e-10)


def test_rounds_without_training_keep_the_spectrum_where_flexlora_loses_it():
    kept = {}
    for name in ("raflora", "flexlora"):
        method, state = start(name)
        state, _ = play(method, state)
        first = exported(method, state)
        for _ in range(5):
            state, _ = play(method, state, train=untouched)
        kept[name] = apart(exported(method, state), first)

    assert kept["raflora"] < 1e-12
    assert kept["flexlora"] > 0.1


def test_a_partition_that_nobody_of_the_round_holds_stays():
    method, state = start("raflora")
    state, _ = play(method, state)
    still, _ = play(method, state, [SMALL, MIDDLE], train=untouched)
    moved, turns = play(method, state, [SMALL, MIDDLE])

    assert apart(exported(method, still), exported(method, state)) < 1e-12
    for module, pair in moved.adapter.factors.items():
        old = state.adapter.factors[module]
        W = old.B[:, 4:] @ old.A[4:]
        for low, high, holders in ((0, 2, turns), (2, 4, turns[1:])):
            examples = sum(turn.client.num_examples for turn in holders)
            for turn in holders:
                own = turn.trained.factors[module]
                W = W + turn.client.num_examples / examples * own.B[:, low:high] @ own.A[low:high]
        U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(pair.product(), (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK])


def test_clients_get_prefixes_of_their_own_rank():
    method, state = start("raflora")
    state, _ = play(method, state)
    for client in CLIENTS:
        sent = take_turn(method, state, replace(client, id="other"), train=untouched).trained
        assert set(sent.ranks.values()) == {client.rank}
        assert all(torch.equal(pair.A, state.adapter.factors[m].A[: client.rank]) for m, pair in sent.factors.items())
