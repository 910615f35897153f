"""LoRA-FAIR by least squares: between FedIT and the projection of the mean product."""

import pytest
import torch
from rounds import CLIENTS, apart, exported, mean_product, play, start

from fedloom.platform.adapter import Adapter, Factors


def played(ridge, rounds=2, **settings):
    method, state = start("lora_fair", {"ridge": ridge})
    for _ in range(rounds):
        state, turns = play(method, state, **settings)
    return state, turns


def mean_factors(turns, module):
    total = sum(turn.client.num_examples for turn in turns)
    weighted = [(turn.client.num_examples / total, turn.trained.factors[module]) for turn in turns]
    return Factors(B=sum(p * own.B for p, own in weighted), A=sum(p * own.A for p, own in weighted))


@pytest.mark.parametrize("ridge", [1e-3, 0.01, 1.0])
def test_b_minimises_the_ridge_objective_formed_in_full(ridge):
    """[A^T; sqrt(lambda) I] D^T = [ideal - B A; 0]^T, by a dense least-squares solver."""
    state, turns = played(ridge)
    for module, pair in state.adapter.factors.items():
        mean = mean_factors(turns, module)
        rank = mean.rank
        left = torch.cat([mean.A.T, ridge**0.5 * torch.eye(rank, dtype=torch.float64)])
        missing = (mean_product(turns, module) - mean.product()).T
        D = torch.linalg.lstsq(left, torch.cat([missing, missing.new_zeros(rank, missing.shape[1])])).solution.T
        torch.testing.assert_close(pair.B, mean.B + D)
        torch.testing.assert_close(pair.A, mean.A)


def test_a_large_ridge_is_fedit():
    method, plain = start("fedit")
    for _ in range(2):
        plain, _ = play(method, plain)

    assert apart(played(1e12)[0].adapter.tensors(), plain.adapter.tensors()) < 1e-9


def test_a_small_ridge_projects_the_mean_product_onto_the_rows_of_a():
    state, turns = played(1e-13, rounds=1)
    for module, pair in state.adapter.factors.items():
        projector = torch.linalg.pinv(pair.A) @ pair.A
        torch.testing.assert_close(pair.product(), mean_product(turns, module) @ projector, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0, 100.0])
def test_it_is_never_further_from_the_mean_product_than_fedit(ridge):
    state, turns = played(ridge)
    for module, pair in state.adapter.factors.items():
        ideal = mean_product(turns, module)
        assert (ideal - pair.product()).norm() < (ideal - mean_factors(turns, module).product()).norm()


def test_where_all_agree_on_a_there_is_nothing_to_correct():
    """Then the mean of the products is the product of the means."""

    def train(received, dispatch, client, number):
        pairs = {m: Factors(B=p.B + 0.1 * client.rank, A=p.A) for m, p in received.factors.items()}
        return Adapter(factors=pairs, head=received.head, scale=received.scale)

    models = []
    for name in ("lora_fair", "fedit"):
        method, state = start(name)
        models.append(exported(method, play(method, state, CLIENTS, train=train)[0]))

    assert apart(*models) < 1e-12
