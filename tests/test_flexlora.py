"""FlexLoRA: the mean of products, cut for every client by its own rank."""

from dataclasses import replace

import pytest
import torch
from rounds import (
    CLIENTS,
    LARGE,
    MIDDLE,
    RANK,
    SHAPES,
    SMALL,
    apart,
    exported,
    mean_product,
    play,
    start,
    take_turn,
    untouched,
)

from fedloom.platform.adapter import Factors
from fedloom.platform.client import Budget
from fedloom.platform.errors import AdapterError

# float64 goes the way of QR, float32 that of Gram matrices.
PRECISIONS = [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance * float(expected.norm()))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_client_loses_exactly_the_tail_of_the_spectrum(rank, dtype, tolerance):
    """B_i A_i is the best rank-r_i approximation of the mean product, A_i has orthonormal rows, B_i^T B_i = sigma^2."""
    method, state = start("flexlora", dtype=dtype)
    state, turns = play(method, state)
    sent = take_turn(method, state, replace(SMALL, rank=rank), train=untouched).trained

    for module, pair in sent.factors.items():
        whole = mean_product(turns, module)
        values = torch.linalg.svdvals(whole)
        assert pair.rank == rank
        close(torch.linalg.norm(whole - pair.product()), torch.linalg.norm(values[rank:]), 100 * tolerance)
        close(pair.A @ pair.A.T, torch.eye(rank), tolerance)
        close(pair.B.T @ pair.B, torch.diag(values[:rank] ** 2), tolerance)


def test_every_client_gets_its_own_rank_and_they_are_nested():
    """Published implementations give every client the last one's factors, or one rank; here each is a prefix."""
    method, state = start("flexlora")
    for _ in range(3):
        turns = [take_turn(method, state, client) for client in CLIENTS]
        for turn in turns:
            assert set(turn.trained.ranks.values()) == {turn.client.rank}
            assert turn.dispatch.scale == state.adapter.scale
            for name, tensor in turn.dispatch.payload.tensors.items():
                k, whole = turn.client.rank, state.adapter.tensors()[name]
                expected = whole[:, :k] if name.endswith(".B") else whole[:k] if name.endswith(".A") else whole
                assert torch.equal(tensor, expected)
        state, _ = play(method, state)


def test_round_zero_hands_out_prefixes_of_one_initial_draw():
    """All clients start from the same A, and B = 0 is not decomposed: that would replace the draw by unit vectors."""
    method, state = start("flexlora")
    small, large = (take_turn(method, state, client, train=untouched).trained for client in (SMALL, LARGE))

    for module, pair in large.factors.items():
        assert torch.equal(small.factors[module].A, pair.A[:2])
        assert not pair.B.any()
        assert torch.linalg.matrix_rank(pair.A) == RANK
        assert (pair.A.abs() > 0).float().mean() > 0.9


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_enough_rank_loses_nothing(dtype, tolerance):
    """Where the ranks of the cohort add up to r at most, the server's product is the mean of the clients'."""
    method, state = start("flexlora", dtype=dtype)
    after, turns = play(method, state, [SMALL, MIDDLE])

    for module, pair in after.adapter.factors.items():
        close(pair.product(), mean_product(turns, module), tolerance)


def test_a_stack_smaller_than_the_rank_is_filled_with_initial_rows():
    """Two clients of rank 2 give 4 directions of 8: beside zero columns of B stand rows of A, which get gradients."""
    method, state = start("flexlora")
    first, _ = play(method, state)
    after, turns = play(method, first, [SMALL, replace(SMALL, id="other")])

    for module, pair in after.adapter.factors.items():
        assert pair.rank == RANK
        assert not pair.B[:, 4:].any()
        assert torch.equal(pair.A[4:], state.adapter.factors[module].A[4:])
        assert pair.A[4:].norm(dim=1).min() > 0.1
        torch.testing.assert_close(pair.product(), mean_product(turns, module))


def test_a_round_without_training_keeps_the_initial_rows():
    """A zero product has no directions: A stays what it was, in round 0 and later, and B is zero."""

    def give_up(received, dispatch, client, number):
        factors = {name: Factors(B=torch.zeros_like(pair.B), A=pair.A) for name, pair in received.factors.items()}
        return replace(received, factors=factors)

    method, state = start("flexlora")
    trained, _ = play(method, state)
    for before in (state, trained):
        after, _ = play(method, before, train=give_up)
        for module, pair in after.adapter.factors.items():
            assert not pair.B.any()
            assert torch.equal(pair.A, before.adapter.factors[module].A)


def test_without_training_a_direction_keeps_the_share_of_those_who_carry_it():
    """sigma_j becomes sigma_j times the weight of the clients with r_k >= j: 1, then 50/60, then 20/60."""
    method, state = start("flexlora")
    state, _ = play(method, state)
    after, _ = play(method, state, train=untouched)
    carried = torch.tensor([1.0] * 2 + [50 / 60] * 2 + [20 / 60] * 4, dtype=torch.float64)

    for module in SHAPES:
        before = torch.linalg.svdvals(state.adapter.factors[module].product())[:RANK]
        found = torch.linalg.svdvals(after.adapter.factors[module].product())[:RANK]
        torch.testing.assert_close(found, (before * carried).sort(descending=True).values)


def test_at_equal_ranks_a_round_without_training_changes_nothing():
    """Then every client carries every direction: the law that unequal ranks break."""
    cohort = [replace(client, rank=RANK) for client in CLIENTS]
    method, state = start("flexlora")
    state, _ = play(method, state, cohort)
    after, _ = play(method, state, cohort, train=untouched)

    assert apart(exported(method, after), exported(method, state)) < 1e-12


def test_equal_clients_average_products_and_not_factors():
    """Unlike FedIT: with equal ranks mean(B) mean(A) is another matrix than mean(B A)."""
    cohort = [replace(client, rank=4) for client in CLIENTS]
    method, state = start("flexlora", rank=4)
    after, turns = play(method, state, cohort)
    plain, other = start("fedit", rank=4)
    naive, _ = play(plain, other, cohort)

    for module, pair in after.adapter.factors.items():
        values = torch.linalg.svdvals(mean_product(turns, module))
        lost = torch.linalg.norm(mean_product(turns, module) - pair.product())
        torch.testing.assert_close(lost, torch.linalg.norm(values[4:]))
        assert torch.linalg.norm(mean_product(turns, module) - naive.adapter.factors[module].product()) > lost


def test_the_head_is_averaged_by_examples():
    method, state = start("flexlora")
    after, turns = play(method, state)

    for name, tensor in after.adapter.head.items():
        small, middle, large = (turn.trained.head[name] for turn in turns)
        torch.testing.assert_close(tensor, small / 6 + middle / 2 + large / 3)


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_ranks_outside_the_adapter_are_refused(rank):
    method, state = start("flexlora")

    with pytest.raises(AdapterError, match=f"'small' of profile 'phone' has rank {rank}, .* rank 8"):
        take_turn(method, state, SMALL, budget=Budget(rank=rank))


def test_residuals_are_added_to_what_is_there():
    """Against dense products: W + sum_k p_k (B_k A_k - trunc_{r_k}(W)), cut at rank r."""
    method, state = start("flexlora", {"aggregation": "residual"})
    state, _ = play(method, state)
    after, turns = play(method, state)
    for module, pair in state.adapter.factors.items():
        U, sigma, Vt = torch.linalg.svd(pair.product(), full_matrices=False)
        W = pair.product()
        for turn in turns:
            k = turn.client.rank
            truncated = (U[:, :k] * sigma[:k]) @ Vt[:k]
            W = W + turn.client.num_examples / 60 * (turn.trained.factors[module].product() - truncated)
        U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(after.adapter.factors[module].product(), (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK])


def test_what_fades_without_training_stays_with_residuals():
    """Ten rounds of clients that do nothing: the energy beyond the smallest rank is lost, or is there to rounding."""
    left = {}
    for aggregation in ("products", "residual"):
        method, state = start("flexlora", {"aggregation": aggregation})
        state, _ = play(method, state)
        before = exported(method, state)
        for _ in range(10):
            state, _ = play(method, state, train=untouched)
        left[aggregation] = apart(exported(method, state), before)

    assert left["products"] > 0.2
    assert left["residual"] < 1e-9
