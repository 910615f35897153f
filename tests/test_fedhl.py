"""FedHL: a model that is never cut, moved by what clients change."""

import torch
from rounds import CLIENTS, RANK, SHAPES, SMALL, apart, exported, mean_product, play, start, untouched


def best(W, rank):
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def test_the_model_moves_by_the_mean_change_of_the_approximations():
    """W + sum_k p_k (B_k A_k - trunc_{r_k}(W)), with dense matrices, round after round."""
    method, state = start("fedhl")
    W = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for _ in range(4):
        state, turns = play(method, state)
        for module, before in W.items():
            sent = sum(t.client.num_examples / 60 * best(before, t.client.rank) for t in turns)
            W[module] = before + mean_product(turns, module) - sent
        whole = exported(method, state)
        assert apart({m: whole[m] for m in W}, {m: state.adapter.scale * now for m, now in W.items()}) < 1e-10
    assert max(state.adapter.ranks.values()) > RANK  # nothing was cut


def test_clients_are_sent_the_best_approximation_of_their_rank():
    method, state = start("fedhl")
    for _ in range(3):
        state, _ = play(method, state)
    _, turns = play(method, state, train=untouched)

    for turn in turns:
        for module, own in turn.trained.factors.items():
            torch.testing.assert_close(own.product(), best(state.adapter.factors[module].product(), turn.client.rank))


def test_what_a_small_client_does_not_see_stays():
    """Alone in a round, a client of rank 2 replaces two directions and leaves the others."""
    method, state = start("fedhl")
    state, _ = play(method, state)
    after, (turn,) = play(method, state, [SMALL])

    for module in SHAPES:
        old = state.adapter.factors[module].product()
        rest = old - best(old, SMALL.rank)
        expected = rest + turn.trained.factors[module].product()
        torch.testing.assert_close(after.adapter.factors[module].product(), expected)


def test_at_ranks_that_hold_everything_it_is_the_mean_of_the_products():
    method, state = start("fedhl")
    cohort = [type(c)(id=c.id, profile=c.profile, rank=RANK, num_examples=c.num_examples) for c in CLIENTS]
    after, turns = play(method, state, cohort)

    for module, pair in after.adapter.factors.items():
        torch.testing.assert_close(pair.product(), mean_product(turns, module))
