"""FedMomentum: nothing is lost, and the largest directions are trained on."""

import torch
from rounds import RANK, SHAPES, apart, exported, mean_product, play, start, untouched


def test_base_and_adapter_hold_the_mean_of_the_products_in_every_round():
    """W_base + s W, where the base has all earlier rounds' small directions; against dense decompositions."""
    method, state = start("fedmomentum")
    base = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for _ in range(3):
        state, turns = play(method, state)
        whole, scale = exported(method, state), state.adapter.scale
        means = {module: mean_product(turns, module) for module in SHAPES}
        assert apart({m: whole[m] for m in SHAPES}, {m: base[m] + scale * means[m] for m in SHAPES}) < 1e-12
        for module, mean in means.items():
            U, sigma, Vt = torch.linalg.svd(mean, full_matrices=False)
            best = (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK]
            torch.testing.assert_close(state.adapter.factors[module].product(), best)
            base[module] = base[module] + scale * (mean - best)


def test_the_patch_grows_by_what_the_rank_does_not_hold():
    """Three clients of rank 2 give six directions: two are trained on, four are patched."""
    method, state = start("fedmomentum", rank=2)
    state, _ = play(method, state)

    assert {pair.rank for pair in state.patch.pieces[0].values()} == {4}
    assert set(state.adapter.ranks.values()) == {2}


def test_both_factors_share_the_singular_values():
    method, state = start("fedmomentum")
    state, _ = play(method, state)

    for pair in state.adapter.factors.values():
        torch.testing.assert_close(pair.B.T @ pair.B, pair.A @ pair.A.T)


def test_a_round_without_training_patches_nothing():
    method, state = start("fedmomentum")
    state, _ = play(method, state)
    state, _ = play(method, state, train=untouched)

    assert {pair.rank for pair in state.patch.pieces[1].values()} == {0}


def test_a_zero_product_keeps_the_initial_rows():
    method, state = start("fedmomentum")
    after, _ = play(method, state, train=untouched)

    assert all(torch.equal(pair.A, state.adapter.factors[m].A) for m, pair in after.adapter.factors.items())
