"""Zero-padding: means of padded factors, and what they do to directions that few hold."""

import pytest
import torch
from rounds import CLIENTS, LARGE, RANK, SCALE, SHAPES, SMALL, apart, exported, play, start, untouched

from fedloom.platform.client import Budget

SHARES = (1 / 6, 1 / 2, 1 / 3)  # 10, 30 and 20 of 60 examples


def padded_mean(turns, pick):
    """Return sum_k p_k pad(pick(client k)) for B and A of one module, entry by entry."""
    B, A = torch.zeros(40, RANK, dtype=torch.float64), torch.zeros(RANK, 22, dtype=torch.float64)
    for share, turn in zip(SHARES, turns, strict=True):
        pair = pick(turn)
        for j in range(turn.client.rank):
            B[:, j] += share * pair[0][:, j]
            A[j] += share * pair[1][j]
    return B, A


@pytest.mark.parametrize("padding", ["values", "change"])
def test_the_server_holds_the_mean_of_padded_factors_or_adds_the_mean_change(padding):
    method, state = start("zero_padding", {"padding": padding})
    for _ in range(2):
        before = state.adapter.factors["layers.0.up"]
        state, turns = play(method, state)

    def pick(turn):
        new, old = turn.trained.factors["layers.0.up"], before.first(turn.client.rank)
        return (new.B, new.A) if padding == "values" else (new.B - old.B, new.A - old.A)

    B, A = padded_mean(turns, pick)
    if padding == "change":
        B, A = before.B + B, before.A + A
    torch.testing.assert_close(state.adapter.factors["layers.0.up"].B, B)
    torch.testing.assert_close(state.adapter.factors["layers.0.up"].A, A)


def test_equal_ranks_are_fedit():
    """With every client at rank r nothing is padded."""
    everyone = [type(client)(id=client.id, profile="p", rank=RANK, num_examples=10) for client in CLIENTS]
    models = []
    for name in ("zero_padding", "fedit"):
        method, state = start(name)
        for _ in range(2):
            state, _ = play(method, state, everyone)
        models.append(exported(method, state))

    assert apart(*models) < 1e-12


def test_a_round_without_training_shrinks_what_few_hold():
    """Directions 5 to 8 are held by a third of the weight alone: each factor keeps a third, their product a ninth."""
    method, state = start("zero_padding")
    state, _ = play(method, state, [LARGE])
    after, _ = play(method, state, train=untouched)

    for module in SHAPES:
        old, new = state.adapter.factors[module], after.adapter.factors[module]
        for rank, kept in ((2, 1.0), (4, 5 / 6), (8, 1 / 3)):
            torch.testing.assert_close(new.B[:, rank - 1], kept * old.B[:, rank - 1])
            torch.testing.assert_close(new.A[rank - 1], kept * old.A[rank - 1])


def test_the_scale_does_not_depend_on_the_rank():
    """A published implementation merges at 16 times the scale at which clients trained."""
    method, state = start("zero_padding")
    scales = {method.dispatch(state, c, Budget(rank=c.rank), torch.Generator()).scale for c in (SMALL, LARGE)}

    assert scales == {SCALE} == {method.export(state)[0].scale}
