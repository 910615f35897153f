"""RoLoRA: one factor a round, the other the same bits for everybody."""

import torch
from rounds import SHAPES, apart, exported, mean_product, play, start


def test_rounds_take_turns_and_the_other_factor_stays_bit_for_bit():
    """B first: with B = 0 the gradient of A would be zero."""
    method, state = start("rolora")
    for trained, frozen in ("BA", "AB", "BA", "AB"):
        after, turns = play(method, state)
        for module in SHAPES:
            before = getattr(state.adapter.factors[module], frozen)
            holders = [turn.trained.factors[module] for turn in turns] + [after.adapter.factors[module]]
            assert all(torch.equal(getattr(pair, frozen), before) for pair in holders)
            assert not torch.equal(
                getattr(after.adapter.factors[module], trained), getattr(state.adapter.factors[module], trained)
            )
        state = after


def test_every_round_is_exact():
    """The mean of the products, formed in full, whichever factor was trained; the head as in FedIT."""
    method, state = start("rolora")
    for _ in range(4):
        state, turns = play(method, state)
        whole = exported(method, state)
        products = {module: state.adapter.scale * mean_product(turns, module) for module in SHAPES}
        assert apart({module: whole[module] for module in SHAPES}, products) < 1e-12
        for part in turns[0].trained.head:
            small, middle, large = (turn.trained.head[part] for turn in turns)
            torch.testing.assert_close(state.adapter.head[part], small / 6 + middle / 2 + large / 3)


def test_only_the_trained_factor_goes_up():
    method, state = start("rolora")
    for trained, frozen in ("BA", "AB"):
        state, turns = play(method, state)
        for turn in turns:
            sent = {name[-1] for name in turn.payload.tensors if not name.startswith("head.")}
            assert sent == {trained}
            assert {trained, "head"} == turn.dispatch.trainable
            assert frozen not in sent
