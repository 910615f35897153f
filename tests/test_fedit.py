"""FedIT: means of factors, and what they are not."""

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
    gaussian,
    mean_product,
    model,
    play,
    start,
)

from fedloom.platform.adapter import Factors
from fedloom.platform.errors import RoundError
from fedloom.platform.partial import merge


def test_the_server_holds_the_mean_of_the_factors():
    """A = sum_k p_k A_k, B and the head likewise, with p_k by number of examples: 10, 30 and 20 of 60."""
    method, state = start("fedit")
    after, turns = play(method, state)

    for name, tensor in after.adapter.tensors().items():
        small, middle, large = (turn.trained.tensors()[name] for turn in turns)
        torch.testing.assert_close(tensor, small / 6 + middle / 2 + large / 3)


@pytest.mark.parametrize("index", [0, 1])
def test_both_of_two_clients_count(index):
    """A published implementation keeps the first client alone: 1, 10 and 100 with equal weights averaged to 1/3."""
    method, state = start("fedit")
    _, turns = play(method, state, (SMALL, MIDDLE))
    both = merge([turn.partial for turn in turns])
    changed = turns[index].trained.tensors() | {"layers.0.q.B": gaussian(18, RANK, seed=9)}
    payload = replace(turns[index].payload, tensors=changed)
    partials = [turn.partial for turn in turns]
    partials[index] = method.lift(turns[index].dispatch, payload, float(turns[index].client.num_examples))

    left, right = (method.finish(state, merged).adapter.tensors() for merged in (both, merge(partials)))

    share = (1 / 4, 3 / 4)[index]
    torch.testing.assert_close(
        right["layers.0.q.B"] - left["layers.0.q.B"],
        share * (changed["layers.0.q.B"] - turns[index].trained.tensors()["layers.0.q.B"]),
    )


def test_the_error_of_the_product_is_the_covariance():
    """sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A), of rank (K - 1) r at most."""
    method, state = start("fedit", rank=2)
    after, turns = play(method, state)

    for module, mean in after.adapter.factors.items():
        error = mean_product(turns, module) - mean.product()
        covariance = sum(
            turn.client.num_examples / 60 * (pair.B - mean.B) @ (pair.A - mean.A)
            for turn in turns
            for pair in [turn.trained.factors[module]]
        )
        torch.testing.assert_close(error, covariance)
        assert torch.linalg.norm(error) > 1e-3
        assert torch.linalg.matrix_rank(error) == (len(turns) - 1) * 2


@pytest.mark.parametrize("common", ["A", "B"])
def test_a_common_factor_makes_the_mean_exact(common):
    """Where all A_k (or all B_k) agree, the mean of the factors is the mean of the products."""

    def train(received, dispatch, client, number):
        own = {
            module: Factors(
                B=pair.B + gaussian(*pair.B.shape, seed=0 if common == "B" else client.rank),
                A=pair.A + gaussian(*pair.A.shape, seed=0 if common == "A" else client.rank),
            )
            for module, pair in received.factors.items()
        }
        return replace(received, factors=own)

    method, state = start("fedit")
    after, turns = play(method, state, train=train)

    for module, pair in after.adapter.factors.items():
        torch.testing.assert_close(pair.product(), mean_product(turns, module))


def test_the_same_product_in_rotated_factors_is_averaged_wrongly():
    """B A = (B R^T)(R A), but two clients with this one product do not average to it. Such is FedIT."""
    method, state = start("fedit")
    rotation = torch.linalg.qr(gaussian(RANK, RANK)).Q

    def train(received, dispatch, client, number):
        pairs = {name: Factors(B=gaussian(*pair.B.shape), A=pair.A) for name, pair in received.factors.items()}
        if client == MIDDLE:
            pairs = {name: Factors(B=pair.B @ rotation.T, A=rotation @ pair.A) for name, pair in pairs.items()}
        return replace(received, factors=pairs)

    after, turns = play(method, state, (SMALL, MIDDLE), train=train)

    assert apart(model(turns[0].trained), model(turns[1].trained)) < 1e-12
    assert apart(exported(method, after), model(turns[0].trained)) > 0.1


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
def test_everybody_trains_the_whole_adapter(client):
    """FedIT knows one rank: the budget changes neither what is sent nor its scale."""
    method, state = start("fedit")
    _, (turn,) = play(method, state, [client])

    assert (turn.dispatch.rank, turn.dispatch.scale) == (RANK, state.adapter.scale)
    assert set(turn.trained.ranks.values()) == {RANK}
    assert turn.trained.ranks.keys() == SHAPES.keys()


def test_weights_that_sum_to_zero_are_refused():
    method, state = start("fedit")

    with pytest.raises(RoundError, match="sum to 0"):
        play(method, state, [replace(LARGE, num_examples=0)])
