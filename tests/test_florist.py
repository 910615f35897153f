"""FLoRIST: where the spectrum is cut, and what either flow does with the pair."""

import itertools

import pytest
import torch
from rounds import (
    CLIENTS,
    LARGE,
    MIDDLE,
    RANK,
    SCALE,
    SHAPES,
    SMALL,
    apart,
    exported,
    leaves,
    mean_product,
    model,
    play,
    same_bits,
    start,
    take_turn,
    untouched,
)

from fedloom.platform.partial import merge

STACKED = sum(client.rank for client in CLIENTS)


def piece_after(options, cohort=CLIENTS, *, dtype=torch.float64, rounds=1):
    """Return the last piece of the patch and the turns of its round."""
    method, state = start("florist", options, dtype=dtype)
    for _ in range(rounds):
        state, turns = play(method, state, cohort)
    return state.patch.pieces[-1], turns


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_the_whole_energy_is_the_exact_mean_of_products(dtype, tolerance):
    """With tau = 1 it is plain stacking: B_g A_g = sum_k w_k B_k A_k, whatever the ranks."""
    piece, turns = piece_after({"tau": 1.0}, dtype=dtype)

    for module, pair in piece.items():
        expected = mean_product(turns, module)
        assert torch.linalg.norm(pair.product() - expected) < tolerance * torch.linalg.norm(expected)
        assert pair.rank == min(STACKED, *SHAPES[module])


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.9, 0.99])
def test_the_cut_is_the_first_that_keeps_the_share(tau):
    """The error is the tail of the spectrum, at most 1 - tau of its energy, and with one rank less it would be more."""
    piece, turns = piece_after({"tau": tau})

    for module, pair in piece.items():
        whole = mean_product(turns, module)
        energy = torch.linalg.svdvals(whole).square()
        lost = torch.linalg.norm(whole - pair.product()) ** 2
        torch.testing.assert_close(lost, energy[pair.rank :].sum())
        assert lost <= (1 - tau) * energy.sum() * (1 + 1e-12)
        assert energy[pair.rank - 1 :].sum() > (1 - tau) * energy.sum()
        torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(pair.rank, dtype=torch.float64))
        torch.testing.assert_close(pair.B.T @ pair.B, torch.diag(energy[: pair.rank]))


def test_every_module_has_a_rank_of_its_own_and_all_grow_with_tau():
    """The rank p is chosen by module; a larger tau keeps at least as much, never more than there is."""
    taus = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
    ranks = [{module: pair.rank for module, pair in piece_after({"tau": tau})[0].items()} for tau in taus]

    for less, more in itertools.pairwise(ranks):
        assert all(1 <= less[module] <= more[module] <= min(STACKED, *SHAPES[module]) for module in SHAPES)
    assert any(len(set(rank.values())) > 1 for rank in ranks)


def test_identical_clients_count_as_one():
    """Ten copies of a client have its product and its rank: duplicates add no directions."""
    method, state = start("florist")
    _, (turn,) = play(method, state, [LARGE])
    one, ten = (method.finish(state, merge([turn.partial] * number)).patch.pieces[0] for number in (1, 10))

    for module in SHAPES:
        torch.testing.assert_close(ten[module].product(), one[module].product())
        assert ten[module].rank == one[module].rank


def test_no_client_is_stacked_twice():
    """A published implementation stacks client 0 with itself: weight w + w^2, and a stack wider than sum r_k."""
    method, state = start("florist", {"tau": 1.0})
    after, turns = play(method, state)
    merged = merge([turn.partial for turn in turns])
    first = turns[0].trained.factors["layers.0.q"].product() / 6

    assert {stack.rank for stack in merged.stacks.values()} == {STACKED}
    expected = mean_product(turns, "layers.0.q")
    found = after.patch.pieces[0]["layers.0.q"].product()
    torch.testing.assert_close(found, expected)
    assert torch.linalg.norm(found - (expected + first / 6)) > 1e-3


def test_the_rank_of_the_whole_is_that_of_the_product_and_not_of_the_stack():
    """Thresholding without a threshold is FlexLoRA without a cut: the two agree where r holds every direction."""
    flex, flex_state = start("flexlora", rank=RANK)
    after, turns = play(flex, flex_state, [SMALL, MIDDLE])
    method, state = start("florist", {"tau": 1.0})
    partials = [method.lift(turn.dispatch, turn.payload, float(turn.client.num_examples)) for turn in turns]
    stacked = method.finish(state, merge(partials))

    assert apart(exported(flex, after), exported(method, stacked)) < 1e-12


def test_merging_adds_every_round_to_the_weights():
    """W after T rounds is W0 + s sum_t B_g^t A_g^t, and each round starts from a new adapter with B = 0."""
    method, state = start("florist")
    total = {module: torch.zeros(SHAPES[module], dtype=torch.float64) for module in SHAPES}
    for number in range(3):
        assert state.patch.version == number
        start_of_round = take_turn(method, state, LARGE, train=untouched).trained
        assert all(not pair.B.any() for pair in start_of_round.factors.values())
        state, _ = play(method, state)
        for module in SHAPES:
            total[module] += state.patch.pieces[-1][module].product()

    whole = exported(method, state)
    for module in SHAPES:
        torch.testing.assert_close(whole[module], SCALE * total[module])
    assert set(method.export(state)[0].ranks.values()) == {0}


def test_fresh_adapters_differ_by_client_and_round_and_follow_from_their_seed():
    """Eight bytes stand for A: the same seed gives the same rows, and no two clients or rounds share one."""
    method, state = start("florist")
    seeds, rows = [], []
    for _ in range(2):
        turns = [take_turn(method, state, client, train=untouched) for client in CLIENTS]
        seeds += [turn.dispatch.payload.seeds["fresh"] for turn in turns]
        rows += [turn.trained.factors["layers.0.q"].A[:2] for turn in turns]
        again = [take_turn(method, state, client, train=untouched) for client in CLIENTS]
        assert all(same_bits(leaves(one), leaves(two)) for one, two in zip(turns, again, strict=True))
        state, _ = play(method, state)

    assert len(set(seeds)) == 6
    assert all(not torch.equal(one, two) for index, one in enumerate(rows) for two in rows[:index])


def test_the_patch_costs_the_chosen_ranks():
    """What every client has to download of a round is 4 sum_l p_l (d_out + d_in) bytes in float32, whatever its r_k."""
    method, state = start("florist", dtype=torch.float32)
    state, _ = play(method, state)
    state, _ = play(method, state)
    expected = [
        4 * sum(pair.rank * sum(SHAPES[module]) for module, pair in piece.items()) for piece in state.patch.pieces
    ]

    assert state.patch.num_bytes() == sum(expected)
    assert state.patch.num_bytes(since=1) == expected[1]


def test_a_round_without_training_is_an_empty_piece():
    """B = 0 everywhere: the piece has rank 0, costs nothing, and no number is undefined."""
    method, state = start("florist")
    state, _ = play(method, state)
    after, _ = play(method, state, train=untouched)

    assert {pair.rank for pair in after.patch.pieces[-1].values()} == {0}
    assert after.patch.num_bytes(since=1) == 0
    assert apart(exported(method, after), exported(method, state)) < 1e-12


def test_both_flows_average_alike():
    """The flows differ in where they go on from, not in the mean: from equal trained adapters they export the same."""
    merging, merged = start("florist")
    going_on, continued = start("florist", {"flow": "continue"})
    _, turns = play(going_on, continued)
    whole = merge([turn.partial for turn in turns])

    models = [
        exported(method, method.finish(state, whole)) for method, state in ((merging, merged), (going_on, continued))
    ]
    assert apart(*models) < 1e-12
    assert apart(model(turns[0].trained), model(turns[1].trained)) > 0.1


@pytest.mark.parametrize("flow", ["merge", "continue"])
def test_a_rank_budget_bounds_every_module_and_keeps_its_best_part(flow):
    """Never more than ``max_rank``, fewer where the energy asks for fewer, and Eckart-Young's best of that rank."""
    ranks = {}
    for tau, budget in ((1.0, 3), (0.5, 3), (0.5, None)):
        method, state = start("florist", {"tau": tau, "max_rank": budget, "flow": flow})
        after, turns = play(method, state)
        pairs = after.patch.pieces[0] if flow == "merge" else after.adapter.factors
        ranks[tau, budget] = {module: pair.rank for module, pair in pairs.items()}
        for module, pair in pairs.items():
            U, sigma, Vt = torch.linalg.svd(mean_product(turns, module), full_matrices=False)
            best = (U[:, : pair.rank] * sigma[: pair.rank]) @ Vt[: pair.rank]
            torch.testing.assert_close(pair.product(), best)

    assert set(ranks[1.0, 3].values()) == {3}
    assert ranks[0.5, 3] == {module: min(3, rank) for module, rank in ranks[0.5, None].items()}
