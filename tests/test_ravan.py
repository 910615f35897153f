"""RAVAN's equations; its laws are in test_laws.py, and what the trainer does with a core in test_fed_sb.py."""

import pytest
import torch
from rounds import CLIENTS, LARGE, MIDDLE, RANK, SHAPES, SMALL, mean_product, play, start, take_turn, untouched

from fedloom.platform.adapter import Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.received import frozen_factors
from fedloom.platform.trained_layers import CoredFactor


def test_every_head_is_the_mean_over_those_who_trained_it():
    """H_i = sum_{k in C_i} (n_k / N_i) H_i,k, and a head that nobody trained keeps its value."""
    method, state = start("ravan", {"choice": "random"})
    state, _ = play(method, state)
    after, turns = play(method, state, [SMALL, MIDDLE])
    untrained = 0
    for module in SHAPES:
        for head in range(4):
            mine = [turn for turn in turns if head in turn.dispatch.trained[module]]
            old, new = (stage.slots[f"{module}.C"][head] for stage in (state, after))
            if not mine:
                untrained += 1
                assert torch.equal(new, old)
                continue
            total = sum(turn.client.num_examples for turn in mine)
            expected = 0.0
            for turn in mine:
                own = turn.trained.factors[module].C[turn.dispatch.trained[module].index(head)]
                expected = expected + turn.client.num_examples / total * own
            torch.testing.assert_close(new, expected)
    assert untrained >= len(SHAPES)  # three heads of four at most were trained


def test_clients_that_train_all_heads_give_the_exact_mean_of_products():
    cohort = [type(c)(id=c.id, profile=c.profile, rank=RANK, num_examples=c.num_examples) for c in CLIENTS]
    method, state = start("ravan")
    for _ in range(2):
        state, turns = play(method, state, cohort)
        for module in SHAPES:
            torch.testing.assert_close(state.adapter.factors[module].product(), mean_product(turns, module))


@pytest.mark.parametrize("choice", ["random", "weight"])
def test_a_weak_client_starts_from_the_server_s_model(choice):
    """What it trains and what is frozen beside it are together the server's product, and a share of the heads."""
    method, state = start("ravan", {"choice": choice}, dtype=torch.float32)
    state, _ = play(method, state)
    for client, heads in ((SMALL, 1), (MIDDLE, 2), (LARGE, 4)):
        turn = take_turn(method, state, client, train=untouched)
        frozen = frozen_factors(turn.dispatch, SHAPES)
        for module, own in turn.trained.factors.items():
            assert own.C.shape == (heads, 2, 2)
            rest = frozen[module].product() if frozen else 0.0
            torch.testing.assert_close(own.product() + rest, state.adapter.factors[module].product())


def test_the_heads_of_the_largest_norm_are_trained():
    method, state = start("ravan", {"choice": "weight"})
    state, _ = play(method, state)
    turn = take_turn(method, state, MIDDLE)

    for module in SHAPES:
        norms = [float(torch.linalg.matrix_norm(H)) for H in state.slots[f"{module}.C"]]
        assert set(turn.dispatch.trained[module]) == set(sorted(range(4), key=lambda head: -norms[head])[:2])


def test_gains_are_multiplied_into_their_heads_once():
    """The layer computes B diag(g_i H_i) z; what is read from it is g_i H_i, and the next client starts from g = 1."""
    generator = torch.Generator().manual_seed(0)
    B, H, z = (torch.randn(*shape, generator=generator) for shape in ((9, 8), (4, 2, 2), (3, 5, 8)))
    layer = CoredFactor(torch.nn.Parameter(B), torch.nn.Parameter(H))
    layer.gain.data.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]).view(4, 1, 1))
    scaled = torch.stack([H[0], 2 * H[1], -H[2], H[3] / 2])

    torch.testing.assert_close(layer(z), z @ torch.block_diag(*scaled).T @ B.T)
    torch.testing.assert_close(layer.folded_core(), scaled)
    torch.testing.assert_close(layer(z[0, :1])[0], Factors(B=B, A=z[0, :1].T, C=layer.folded_core()).product()[:, 0])


def test_a_rank_that_cannot_be_shared_out_is_refused():
    with pytest.raises(AdapterError, match=r"adapter.rank 8 cannot be shared out among 3 heads"):
        start("ravan", {"heads": 3})
