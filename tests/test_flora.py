"""FLoRA: the stack is the mean of the products, without cross terms and without a decomposition."""

import torch
from rounds import CLIENTS, SHAPES, apart, exported, mean_product, model, play, start, untouched

from fedloom.platform.adapter import Factors
from fedloom.platform.received import received_adapter


def test_the_base_moves_by_the_mean_of_the_products():
    """Formed in full: W + s sum_k p_k B_k A_k, round after round."""
    method, state = start("flora")
    weights = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for _ in range(3):
        state, turns = play(method, state)
        weights = {module: W + state.adapter.scale * mean_product(turns, module) for module, W in weights.items()}

        whole = exported(method, state)
        assert apart({module: whole[module] for module in SHAPES}, weights) < 1e-12


def test_the_weight_stands_on_one_factor():
    """On both factors it would be squared: the products differ by more than half."""
    method, state = start("flora")
    state, turns = play(method, state)
    (piece,) = state.patch.pieces
    total = sum(turn.client.num_examples for turn in turns)
    shares = torch.cat([torch.full((t.client.rank,), t.client.num_examples / total).double() for t in turns])

    for module, stack in piece.items():
        squared = Factors(B=stack.B * shares, A=stack.A).product()
        expected = mean_product(turns, module)
        torch.testing.assert_close(stack.product(), expected)
        assert torch.linalg.norm(squared - expected) > 0.4 * torch.linalg.norm(expected)


def test_a_piece_has_the_rank_of_all_clients_together():
    method, state = start("flora")
    state, _ = play(method, state)

    assert {pair.rank for pair in state.patch.pieces[0].values()} == {sum(client.rank for client in CLIENTS)}


def test_every_round_starts_from_a_fresh_adapter_of_the_client_s_rank():
    method, state = start("flora")
    for _ in range(2):
        after, turns = play(method, state)
        for turn in turns:
            received = received_adapter(turn.dispatch, SHAPES)
            assert set(received.ranks.values()) == {turn.client.rank}
            assert all(not pair.B.any() and pair.A.any() for pair in received.factors.values())
        state = after


def test_without_training_the_base_stays():
    method, state = start("flora")
    state, _ = play(method, state)
    after, _ = play(method, state, train=untouched)

    assert apart(exported(method, after), exported(method, state)) < 1e-12


def test_one_client_s_model_is_its_own():
    method, state = start("flora")
    after, (turn,) = play(method, state, CLIENTS[:1])

    assert apart(exported(method, after), model(turn.trained, state.patch)) < 1e-12
