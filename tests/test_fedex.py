"""FedEx-LoRA: the means of the factors, and a residual that makes them exact."""

import pytest
import torch
from rounds import CLIENTS, RANK, SHAPES, apart, exported, mean_product, play, start

from fedloom.platform.partial import merge


def dense_residual(turns, module, mean):
    return mean_product(turns, module) - mean.product()


def test_the_model_holds_the_mean_of_the_products_in_every_round():
    """W + s (sum of all residuals so far) + s B A, against the products formed in full."""
    method, state = start("fedex")
    base = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for _ in range(3):
        state, turns = play(method, state)
        scale = state.adapter.scale
        whole = exported(method, state)
        expected = {module: W + scale * mean_product(turns, module) for module, W in base.items()}
        assert apart({module: whole[module] for module in SHAPES}, expected) < 1e-12
        base = {m: W + scale * dense_residual(turns, m, state.adapter.factors[m]) for m, W in base.items()}


def test_clients_go_on_from_the_means_of_the_factors():
    fedex, fedit = start("fedex"), start("fedit")
    after, _ = play(*fedex)
    plain, _ = play(*fedit)

    left, right = after.adapter.tensors(), plain.adapter.tensors()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_residual_is_the_covariance_and_has_its_rank():
    """(K - 1) r directions, not K r: one client follows from the others."""
    method, state = start("fedex", rank=2)
    state, turns = play(method, state)

    for module, pair in state.patch.pieces[0].items():
        mean = state.adapter.factors[module]
        covariance = sum(
            turn.client.num_examples / 60 * (own.B - mean.B) @ (own.A - mean.A)
            for turn in turns
            for own in [turn.trained.factors[module]]
        )
        torch.testing.assert_close(pair.product(), covariance)
        assert pair.rank == (len(turns) - 1) * 2 == torch.linalg.matrix_rank(covariance)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_whoever_follows_from_the_others_the_residual_is_the_same(order):
    method, state = start("fedex")
    _, turns = play(method, state)
    after = method.finish(state, merge([turns[index].partial for index in order]))

    for module, pair in after.patch.pieces[0].items():
        torch.testing.assert_close(pair.product(), dense_residual(turns, module, after.adapter.factors[module]))


def test_a_single_client_leaves_no_residual():
    method, state = start("fedex")
    state, _ = play(method, state, CLIENTS[:1])

    assert {pair.rank for pair in state.patch.pieces[0].values()} == {0}


def test_a_residual_may_be_cut_to_its_largest_directions():
    """The best approximation of rank 3 of the residual, by a dense decomposition."""
    method, state = start("fedex", {"residual_rank": 3})
    state, turns = play(method, state)

    for module, pair in state.patch.pieces[0].items():
        U, sigma, Vt = torch.linalg.svd(dense_residual(turns, module, state.adapter.factors[module]))
        torch.testing.assert_close(pair.product(), (U[:, :3] * sigma[:3]) @ Vt[:3])
    assert RANK > 3
