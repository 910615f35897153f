"""FFA-LoRA: one frozen A, and a mean without a cross term."""

import torch
from rounds import CLIENTS, SHAPES, apart, exported, mean_product, play, start, take_turn

from fedloom.platform.received import received_adapter


def test_the_mean_of_the_factors_is_the_mean_of_the_products():
    """sum_k p_k B_k A = (sum_k p_k B_k) A, formed in full: 10, 30 and 20 of 60 examples."""
    method, state = start("ffa")
    for _ in range(3):
        state, turns = play(method, state)

    whole = exported(method, state)
    products = {module: state.adapter.scale * mean_product(turns, module) for module in SHAPES}
    assert apart({module: whole[module] for module in SHAPES}, products) < 1e-12
    for part in turns[0].trained.head:
        small, middle, large = (turn.trained.head[part] for turn in turns)
        torch.testing.assert_close(state.adapter.head[part], small / 6 + middle / 2 + large / 3)


def test_a_is_the_same_bits_for_everybody_in_every_round():
    method, state = start("ffa", dtype=torch.float32)
    first = {module: pair.A for module, pair in state.adapter.factors.items()}
    for _ in range(3):
        state, turns = play(method, state)
        for held in (state.adapter, *(turn.trained for turn in turns)):
            assert all(torch.equal(held.factors[module].A, A) for module, A in first.items())


def test_no_message_holds_a():
    """Down goes a seed of eight bytes in its place, from which a client draws it in any round."""
    method, state = start("ffa", dtype=torch.float32)
    state, _ = play(method, state)
    turn = take_turn(method, state, CLIENTS[0])

    for payload in (turn.dispatch.payload, turn.payload):
        assert not [name for name in payload.tensors if name.endswith(".A")]
    received = received_adapter(turn.dispatch, SHAPES)
    assert all(torch.equal(received.factors[m].B, state.adapter.factors[m].B) for m in SHAPES)
    assert all(torch.equal(received.factors[m].A, state.adapter.factors[m].A) for m in SHAPES)


def test_modules_of_equal_shape_have_rows_of_their_own():
    """A published implementation sets the seed anew for every module, so that equal shapes share one factor."""
    _, state = start("ffa", shapes={"one": (6, 9), "other": (6, 9)})

    assert not torch.equal(state.adapter.factors["one"].A, state.adapter.factors["other"].A)
