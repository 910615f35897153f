"""FLoRIST's second flow: clients go on from the global pair, cut to their ranks or padded."""

from dataclasses import replace

import pytest
import torch
from rounds import (
    CLIENTS,
    HEADS_BYTES,
    LARGE,
    MIDDLE,
    RANK,
    SHAPES,
    SMALL,
    frozen_copy,
    gaussian,
    leaves,
    play,
    same_bits,
    start,
    take_turn,
    untouched,
)

from fedloom.platform.adapter import Factors

CONTINUE = {"flow": "continue", "tau": 0.8}


def test_continuing_starts_from_the_global_pair():
    """Clients with r_k <= p get its first r_k directions; the others get all, and rows of A to train more on."""
    method, state = start("florist", CONTINUE)
    state, turns = play(method, state)
    assert all(torch.equal(one, two) for one, two in zip(*round_zero_rows(turns), strict=True))
    ranks = state.adapter.ranks
    assert 2 < min(ranks.values()) < RANK

    small, large = (take_turn(method, state, client, train=untouched).trained for client in (SMALL, LARGE))
    other = take_turn(method, state, replace(LARGE, id="other"), train=untouched).trained
    for module, pair in state.adapter.factors.items():
        p = pair.rank
        assert torch.equal(small.factors[module].product(), pair.first(2).product())
        torch.testing.assert_close(large.factors[module].product(), pair.first(RANK).product())
        assert large.ranks[module] == RANK
        assert not large.factors[module].B[:, p:].any()
        assert p >= RANK or large.factors[module].A[p:].norm(dim=1).min() > 0.1
        assert torch.equal(other.factors[module].A, large.factors[module].A)


def round_zero_rows(turns):
    """Return the first rows of A that the small and the large client were sent."""
    small, _, large = (turn.dispatch.payload.tensors for turn in turns)
    return [small[f"{module}.A"] for module in SHAPES], [large[f"{module}.A"][:2] for module in SHAPES]


def test_padding_is_drawn_anew_in_every_round():
    method, state = start("florist", CONTINUE)
    seeds = []
    for _ in range(3):
        state, _ = play(method, state)
        seeds += [take_turn(method, state, LARGE).dispatch.payload.seeds["pad"]]

    assert len(set(seeds)) == 3


@pytest.mark.parametrize("padding", ["fresh", "zero"])
def test_continuing_is_charged_for_what_is_sent(padding):
    """Down: min(p_l, r_k) directions by module, and a seed if rows are to be drawn; up: what the client has trained."""
    method, state = start("florist", {**CONTINUE, "padding": padding}, dtype=torch.float32)
    state, _ = play(method, state)

    for client in CLIENTS:
        turn = take_turn(method, state, client)
        sent = {module: min(rank, client.rank) for module, rank in state.adapter.ranks.items()}
        padded = padding == "fresh" and min(sent.values()) < client.rank
        trained = dict.fromkeys(sent, client.rank) if padded else sent
        down, up = (4 * sum(sum(SHAPES[m]) * rank for m, rank in ranks.items()) for ranks in (sent, trained))
        assert turn.dispatch.payload.num_bytes == down + HEADS_BYTES + (8 if padded else 0)
        assert turn.payload.num_bytes == up + HEADS_BYTES


def test_zero_padding_is_the_same_as_no_padding():
    """A zero row beside a zero column has no gradient: AdamW leaves it alone, so nothing need be sent for it."""
    x, target = gaussian(30, 16), gaussian(18, 16)
    small = Factors(B=gaussian(18, 2), A=gaussian(2, 30))
    padded = Factors(B=torch.nn.functional.pad(small.B, (0, 3)), A=torch.nn.functional.pad(small.A, (0, 0, 0, 3)))
    trained = []
    for pair in (small, padded):
        B, A = (tensor.clone().requires_grad_() for tensor in (pair.B, pair.A))
        optimizer = torch.optim.AdamW([B, A], lr=0.05, weight_decay=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (B @ A @ x - target).square().mean().backward()
            optimizer.step()
        trained.append((B.detach(), A.detach()))

    (B, A), (wide_B, wide_A) = trained
    torch.testing.assert_close(wide_B[:, :2], B)
    torch.testing.assert_close(wide_A[:2], A)
    assert not wide_B[:, 2:].any()
    assert not wide_A[2:].any()


def test_clients_never_touch_the_servers_pair():
    """In the published code each client's cut overwrites the global file, and the next client continues from that."""
    method, state = start("florist", CONTINUE)
    state, _ = play(method, state)
    before = frozen_copy(state.adapter)
    for client in (SMALL, MIDDLE, LARGE):
        take_turn(method, state, client)

    assert same_bits(leaves(state.adapter), before)


def test_continuing_without_any_update_keeps_rows_to_train_on():
    """B = 0 in all uploads: the pair is zero and A stays, so that the next round can still learn."""

    def give_up(received, dispatch, client, number):
        pairs = {name: Factors(B=torch.zeros_like(pair.B), A=pair.A) for name, pair in received.factors.items()}
        return replace(received, factors=pairs)

    method, state = start("florist", CONTINUE)
    state, _ = play(method, state)
    after, _ = play(method, state, train=give_up)

    for module, pair in after.adapter.factors.items():
        assert not pair.B.any()
        assert torch.equal(pair.A, state.adapter.factors[module].A)
