"""The engine of the methods that average products, against dense decompositions in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import gaussian

from fedloom.methods.algebra import energy_rank, lift_product, mean_product, stacked_svd
from fedloom.platform.errors import AdapterError, RoundError
from fedloom.platform.method import Payload
from fedloom.platform.partial import merge

RANKS = (16, 8, 4, 4, 2)  # 34 together
SHAPES = {"wide": (60, 90), "tall": (90, 60), "narrow": (24, 50), "narrow tall": (50, 24), "square": (34, 34)}
# How far the clients' factors are from those that they started with; None: they have nothing in common.
DRIFTS = {"gaussian": None, "drift": 0.1, "near": 1e-3, "nearer": 1e-5, "duplicates": 0.0}


def stacks(d_out, d_in, drift, *, ranks=RANKS, dtype=torch.float64):
    """Return the stacked factors of clients with these ranks."""
    shared = gaussian(d_out, max(ranks)), gaussian(max(ranks), d_in)
    parts = []
    for index, rank in enumerate(ranks):
        B, A = gaussian(d_out, rank, seed=10 + index), gaussian(rank, d_in, seed=10 + index)
        if drift is not None:
            B, A = shared[0][:, :rank] + drift * B, shared[1][:rank] + drift * A
        parts.append((B, A / len(ranks)))
    return torch.cat([B for B, _ in parts], dim=1).to(dtype), torch.cat([A for _, A in parts]).to(dtype)


def product(svd):
    return (svd.U.double() * svd.sigma.double()) @ svd.Vt.double()


def relative(found, expected):
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def loss_of_orthonormality(rows):
    rows = rows.double()
    loss = (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs()
    return float(loss.max()) if len(rows) else 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_the_svd_of_the_product(shape, drift, dtype, tolerance):
    """Product and singular values are those of the dense matrix in float64; both sides are orthonormal."""
    B, A = stacks(*SHAPES[shape], DRIFTS[drift], dtype=dtype)
    dense = B.double() @ A.double()
    values = torch.linalg.svdvals(dense)

    svd = stacked_svd(B, A)

    assert {svd.U.dtype, svd.sigma.dtype, svd.Vt.dtype} == {dtype}
    assert relative(product(svd), dense) < tolerance
    assert float((svd.sigma.double() - values[: len(svd.sigma)]).abs().max() / values[0]) < tolerance
    assert loss_of_orthonormality(svd.Vt) < min(1e-5, 1e3 * tolerance)
    assert loss_of_orthonormality(svd.U.T) < min(1e-5, 1e3 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_directions_are_the_best_approximation(shape, drift, dtype, tolerance):
    """Eckart and Young: with q directions kept, nothing but the tail of the spectrum is lost."""
    B, A = stacks(*SHAPES[shape], DRIFTS[drift], dtype=dtype)
    dense = B.double() @ A.double()
    values = torch.linalg.svdvals(dense)

    svd = stacked_svd(B, A, 6)

    assert len(svd.sigma) == 6
    lost = torch.linalg.norm(dense - product(svd))
    torch.testing.assert_close(lost, torch.linalg.norm(values[6:]), rtol=0, atol=tolerance * float(values[0]))


@pytest.mark.parametrize("keep", [10, lambda sigma: min(10, len(sigma))], ids=["number", "function"])
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize(("d_out", "d_in", "ranks"), [(260, 320, (80, 80, 80)), (230, 220, (90, 90, 90))])
def test_of_a_large_spectrum_only_what_is_wanted_is_computed(d_out, d_in, ranks, drift, keep):
    """By Gram matrices and by the product: the first ten of some 200 directions are as good as if all were there."""
    B, A = stacks(d_out, d_in, DRIFTS[drift], ranks=ranks, dtype=torch.float32)
    dense = B.double() @ A.double()
    values = torch.linalg.svdvals(dense)

    svd = stacked_svd(B, A, keep)

    assert len(svd.sigma) == 10
    torch.testing.assert_close(svd.sigma.double(), values[:10], rtol=0, atol=1e-6 * float(values[0]))
    lost = torch.linalg.norm(dense - product(svd))
    torch.testing.assert_close(lost, torch.linalg.norm(values[10:]), rtol=0, atol=1e-6 * float(values[0]))
    assert max(loss_of_orthonormality(svd.U.T), loss_of_orthonormality(svd.Vt)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_clients_that_agree_have_the_rank_of_one(shape, dtype):
    """Exact duplicates add no directions, whatever the route."""
    few, many = (stacks(*SHAPES[shape], 0.0, ranks=ranks, dtype=dtype) for ranks in ((5, 5, 3), (12, 12, 12)))

    assert [len(stacked_svd(*stack).sigma) for stack in (few, many)] == [5, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_has_no_directions(shape, dtype):
    """Untrained clients (B = 0), opposite updates and an empty stack give q = 0 and no NaN."""
    d_out, d_in = SHAPES[shape]
    B, A = stacks(d_out, d_in, None, dtype=dtype)
    opposite = torch.cat([B, B], dim=1), torch.cat([A, -A])

    for zero in ((torch.zeros_like(B), A), (B, torch.zeros_like(A)), opposite, (B[:, :0], A[:0])):
        svd = stacked_svd(*zero)
        assert [tuple(part.shape) for part in svd] == [(d_out, 0), (0,), (0, d_in)]


@pytest.mark.parametrize("sign", [1, -1], ids=["agree", "oppose"])
@pytest.mark.parametrize("exponent", torch.arange(2, 18).div(2).tolist())
def test_both_sides_stay_orthonormal_however_close_clients_are(exponent, sign):
    """Between clients that differ and clients that agree, or all but cancel, no direction loses its right angles."""
    B, A = stacks(160, 90, 10.0**-exponent, ranks=(6, 6), dtype=torch.float32)
    A[6:] *= sign

    svd = stacked_svd(B, A)

    assert max(loss_of_orthonormality(svd.U.T), loss_of_orthonormality(svd.Vt)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_columns_of_zeros_are_passed_over(dtype):
    """A client that has not moved B adds nothing and breaks nothing."""
    B, A = stacks(60, 90, None, dtype=dtype)
    B[:, 3:9] = 0

    svd = stacked_svd(B, A)

    assert len(svd.sigma) == B.shape[1] - 6
    assert relative(product(svd), B.double() @ A.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_how_a_term_splits_between_its_factors_is_irrelevant(dtype):
    """Since b a = (b c) (a / c), factors of very unequal norms cost no digits."""
    B, A = stacks(60, 90, None, dtype=dtype)
    scale = 2.0 ** torch.arange(-17, 17, dtype=dtype)  # powers of two change no bit but the exponent

    balanced, skewed = stacked_svd(B, A), stacked_svd(B * scale, A / scale[:, None])

    assert relative(product(skewed), product(balanced)) < 1e-6
    assert len(skewed.sigma) == len(balanced.sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_fixed(shape, dtype):
    """The entry of largest magnitude of each column of U is positive, and equal inputs give equal bits."""
    B, A = stacks(*SHAPES[shape], None, dtype=dtype)

    svd = stacked_svd(B, A)

    assert (svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True)) > 0).all()
    assert all(torch.equal(one, other) for one, other in zip(svd, stacked_svd(B, A), strict=True))


def test_of_equal_entries_the_first_is_positive():
    svd = stacked_svd(torch.tensor([[-1.0], [1.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))

    torch.testing.assert_close(svd.U[:, 0], torch.tensor([1.0, -1.0, 0.0]) / 2**0.5)
    torch.testing.assert_close(svd.Vt[0], torch.tensor([-1.0, 0.0, 0.0, 0.0]))


def test_only_wanted_directions_are_formed():
    """``keep`` is a number or a function of the whole spectrum; it never asks for more than there is."""
    B, A = stacks(60, 90, None)
    seen = []

    def half(sigma):
        seen.append(sigma)
        return len(sigma) // 2

    assert [len(stacked_svd(B, A, keep).sigma) for keep in (0, 7, 1000, half, None)] == [0, 7, 34, 17, 34]
    torch.testing.assert_close(seen[0], torch.linalg.svdvals(B @ A)[:34])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_that_are_not_finite_are_refused(dtype, wrong):
    B, A = stacks(60, 90, None, dtype=dtype)
    A[2, 3] = wrong

    with pytest.raises(AdapterError, match="NaN or infinity"):
        stacked_svd(B, A)


def test_the_energy_is_of_squared_values():
    """Values (3, 1) have the energies 9 and 1: the first alone reaches a share of 0.9, which 3 of 4 is not."""
    sigma = torch.tensor([3.0, 1.0])

    assert [energy_rank(sigma, tau) for tau in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_a_tie_counts_as_reached():
    """The first k of n equal directions have the share k / n, seldom a binary number: the rank is exactly k."""
    for n in range(1, 40):
        sigma = torch.full((n,), 0.3)
        assert [energy_rank(sigma, k / n) for k in range(1, n + 1)] == list(range(1, n + 1))


def test_the_whole_energy_keeps_every_direction():
    """For tau = 1 a tiny direction stays, which sums of squares cannot see; zeros have no directions."""
    assert energy_rank(torch.tensor([1.0, 1e-9], dtype=torch.float64), 1.0) == 2
    assert energy_rank(torch.zeros(4), 0.9) == 0
    assert energy_rank(torch.zeros(0), 0.9) == 0


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_the_rank_is_the_smallest_and_grows_with_tau(values, tau, other):
    """energy(p - 1) < tau <= energy(p), and a larger tau never keeps less."""
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    share = [0.0, *itertools.accumulate((sigma.square() / sigma.square().sum()).tolist())]

    p = energy_rank(sigma, tau)

    assert share[p] >= tau - 1e-9
    assert tau == 1 or share[p - 1] < tau + 1e-9
    low, high = sorted((tau, other))
    assert energy_rank(sigma, low) <= energy_rank(sigma, high)


def lifted(rank, seed, weight):
    B, A = gaussian(12, rank, seed=seed), gaussian(rank, 20, seed=seed)
    head = {"head.bias": gaussian(3, seed=seed)}
    return (
        lift_product(Payload(tensors={"q.B": B, "q.A": A, **head}), weight),
        weight * B @ A,
        weight * head["head.bias"],
    )


def test_the_stack_is_the_weighted_sum_of_products():
    """B_stack A_stack = sum_k w_k B_k A_k without cross terms; weights on both sides would give w_k^2."""
    parts = [lifted(rank, seed, weight) for rank, seed, weight in ((2, 0, 10.0), (4, 1, 30.0), (1, 2, 5.0))]
    merged = merge([partial for partial, _, _ in parts])
    expected = sum(product for _, product, _ in parts)

    assert merged.stacks["q"].rank == 2 + 4 + 1
    torch.testing.assert_close(merged.stacks["q"].product(), expected)
    torch.testing.assert_close(merged.sums["head.bias"], sum(head for _, _, head in parts))
    torch.testing.assert_close(mean_product(merged, "q", 7).product(), expected / 45)
    twice = sum(partial.weight * product for partial, product, _ in parts)
    assert relative(twice / 45**2, expected / 45) > 0.1


def test_singular_values_stand_in_b_and_a_is_orthonormal():
    """B^T B = diag(sigma^2) and A A^T = I."""
    merged = merge([lifted(3, 0, 10.0)[0], lifted(2, 1, 20.0)[0]])

    pair = mean_product(merged, "q", 5)

    sigma = torch.linalg.svdvals(merged.stacks["q"].product() / 30)[:5]
    torch.testing.assert_close(pair.B.T @ pair.B, torch.diag(sigma**2))
    torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(5, dtype=torch.float64))


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(RoundError, match="sum to 0"):
        mean_product(lifted(2, 0, 0.0)[0], "q", 2)
