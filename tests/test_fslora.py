"""FSLoRA: what is drawn, what a client trains, and what the server does with the differences."""

import itertools
from dataclasses import replace

import pytest
import torch
from rounds import (
    CLIENTS,
    HEAD,
    LARGE,
    MIDDLE,
    RANK,
    SCALE,
    SHAPES,
    SMALL,
    apart,
    exported,
    gaussian,
    play,
    start,
    take_turn,
    untouched,
)

from fedloom.methods.fslora import FSLoRA
from fedloom.platform.client import Budget
from fedloom.platform.errors import AdapterError

EQUAL = tuple(replace(client, num_examples=20) for client in CLIENTS)


def index_of(turn, module):
    """Return I of a client, as both sides draw it from the seed."""
    return FSLoRA().sketch(turn.dispatch.payload.seeds["sketch"], module, turn.dispatch.rank, turn.dispatch.global_rank)


def test_a_sketch_of_everything_is_federated_averaging():
    """At k = r the sketch is the identity and the uniform mean is FedIT's with equal weights."""
    method, state = start("fslora")
    plain, other = start("fedit")
    for _ in range(3):
        state, _ = play(method, state, EQUAL, ratio=1.0)
        other, _ = play(plain, other, EQUAL)

    assert apart(exported(method, state), exported(plain, other)) < 1e-12


@pytest.mark.parametrize("k", range(1, RANK + 1))
def test_a_sketch_is_k_sorted_indices_that_follow_from_the_seed(k):
    """Unique and in order, so that k = r is the identity; other seeds and modules draw others."""
    sketches = [FSLoRA().sketch(seed, module, k, RANK).tolist() for seed in range(20) for module in SHAPES]

    assert all(len(set(one)) == k and one == sorted(one) and set(one) <= set(range(RANK)) for one in sketches)
    assert sketches == [FSLoRA().sketch(seed, module, k, RANK).tolist() for seed in range(20) for module in SHAPES]
    assert k == RANK or len(set(map(tuple, sketches))) > 1


@pytest.mark.parametrize(("scope", "distinct"), [("module", len(SHAPES)), ("model", 1)])
def test_modules_draw_apart_unless_the_model_shares_one_sketch(scope, distinct):
    sketches = {tuple(FSLoRA(scope=scope).sketch(3, module, 8, 64).tolist()) for module in SHAPES}

    assert len(sketches) == distinct


def test_every_subset_is_as_likely_as_any_other():
    """S is unbiased because I is uniform: 56 subsets of 3 in 8, drawn 5600 times, 100 each with 5 sigma to spare."""
    counts = dict.fromkeys(itertools.combinations(range(8), 3), 0)
    for seed in range(5600):
        counts[tuple(FSLoRA().sketch(seed, "q", 3, 8).tolist())] += 1

    assert len(counts) == 56
    assert max(abs(count - 100) for count in counts.values()) < 50
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 55 + 5 * (2 * 55) ** 0.5  # chi-squared, 55 d.f.


@pytest.mark.parametrize("k", range(1, 9))
def test_the_sketch_is_unbiased_and_its_noise_has_a_closed_form(k):
    """Over all subsets: E[S] = I, E[S^2] = (r/k) I, and E||BSA - BA||^2 by the norms of the rank-one terms."""
    r, (B, A) = 8, (gaussian(10, 8), gaussian(8, 12))
    diagonals = []
    for subset in itertools.combinations(range(r), k):
        S = torch.zeros(r, dtype=torch.float64)
        S[list(subset)] = r / k
        diagonals.append(S)
    mean = sum(diagonals) / len(diagonals)
    noise_power = sum(torch.linalg.norm((B * S) @ A - B @ A) ** 2 for S in diagonals) / len(diagonals)
    terms = (B.norm(dim=0) * A.norm(dim=1)).square().sum()
    expected = r / k * (r - k) / (r - 1) * terms - (r - k) / (k * (r - 1)) * torch.linalg.norm(B @ A) ** 2

    torch.testing.assert_close(mean, torch.ones(r, dtype=torch.float64))
    torch.testing.assert_close(sum(S**2 for S in diagonals) / len(diagonals), torch.full_like(mean, r / k))
    torch.testing.assert_close(noise_power, expected)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
def test_the_compact_client_is_the_sketched_model(client):
    """W0 + s B S A and a rank-k adapter of scale s r/k: same output, same gradients in I, none outside it."""
    method, state = start("fslora")
    state, _ = play(method, state)
    turn = take_turn(method, state, client, train=untouched)
    module, x = "layers.0.up", gaussian(22, 5)
    full = state.adapter.factors[module]
    index = index_of(turn, module)
    S = torch.zeros(RANK, dtype=torch.float64)
    S[index] = RANK / client.rank
    whole = [tensor.clone().requires_grad_() for tensor in (full.B, full.A)]
    small = [
        tensor.clone().requires_grad_() for tensor in (turn.trained.factors[module].B, turn.trained.factors[module].A)
    ]

    sketched = SCALE * (whole[0] * S) @ whole[1] @ x
    compact = turn.dispatch.scale * small[0] @ small[1] @ x
    sketched.pow(3).sum().backward()
    compact.pow(3).sum().backward()

    assert turn.dispatch.scale == SCALE * RANK / client.rank
    torch.testing.assert_close(compact, sketched)
    torch.testing.assert_close(small[0].grad, whole[0].grad[:, index])
    torch.testing.assert_close(small[1].grad, whole[1].grad[index])
    outside = [rank for rank in range(RANK) if rank not in index.tolist()]
    assert not whole[0].grad[:, outside].any()
    assert not whole[1].grad[outside].any()


def test_a_and_b_of_a_module_share_their_indices():
    """S stands between B and A; independent draws for the two would send the wrong rows."""
    method, state = start("fslora")
    state, _ = play(method, state)
    turn = take_turn(method, state, MIDDLE, train=untouched)

    for module, pair in state.adapter.factors.items():
        index = index_of(turn, module)
        assert torch.equal(turn.dispatch.payload.tensors[f"{module}.B"], pair.B[:, index])
        assert torch.equal(turn.dispatch.payload.tensors[f"{module}.A"], pair.A[index])


def test_clients_and_rounds_draw_anew():
    method, state = start("fslora")
    seeds = set()
    for _ in range(3):
        state, turns = play(method, state)
        seeds |= {turn.dispatch.payload.seeds["sketch"] for turn in turns}

    assert len(seeds) == 9


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
def test_a_client_trains_the_share_k_over_r(client):
    """The released code selects nothing and trains all; here the client's factors are k/r of the global ones."""
    method, state = start("fslora")
    turn = take_turn(method, state, client)
    own = sum(pair.B.numel() + pair.A.numel() for pair in turn.trained.factors.values())
    whole = sum(pair.B.numel() + pair.A.numel() for pair in state.adapter.factors.values())

    assert own * RANK == whole * client.rank


def test_the_mean_is_over_participants_and_not_over_those_who_touched_a_column():
    """A column that one of three clients was sent moves by a third of its difference; one that none was, not at all."""
    method, state = start("fslora")
    cohort = [replace(SMALL, id=f"small-{number}", num_examples=10**number) for number in range(3)]
    after, turns = play(method, state, cohort)

    for module, old in state.adapter.factors.items():
        expected_B, expected_A = old.B.clone(), old.A.clone()
        for turn in turns:
            index = index_of(turn, module)
            expected_B[:, index] += (turn.trained.factors[module].B - old.B[:, index]) / 3
            expected_A[index] += (turn.trained.factors[module].A - old.A[index]) / 3
        torch.testing.assert_close(after.adapter.factors[module].B, expected_B)
        torch.testing.assert_close(after.adapter.factors[module].A, expected_A)
        untouched_ranks = set(range(RANK)) - {rank for turn in turns for rank in index_of(turn, module).tolist()}
        assert torch.equal(after.adapter.factors[module].A[list(untouched_ranks)], old.A[list(untouched_ranks)])


def test_the_head_is_averaged_in_full_and_uniformly():
    method, state = start("fslora")
    after, turns = play(method, state)

    for name in HEAD:
        torch.testing.assert_close(after.adapter.head[name], sum(turn.trained.head[name] for turn in turns) / 3)


def test_in_round_zero_only_b_can_move():
    """B = 0: the output is that of the base model for any sketch, and the gradient of A is exactly zero."""
    method, state = start("fslora")
    turn = take_turn(method, state, MIDDLE, train=untouched)
    pair = turn.trained.factors["layers.0.q"]
    B, A = pair.B.clone().requires_grad_(), pair.A.clone().requires_grad_()

    output = B @ A @ gaussian(30, 4)
    (output * gaussian(18, 4)).sum().backward()

    assert not output.any()
    assert not A.grad.any()
    assert B.grad.any()


@pytest.mark.parametrize(("ratio", "k"), [(1.0, 8), (0.5, 4), (0.49, 3), (0.375, 3), (0.001, 1)])
def test_a_ratio_wins_over_the_rank_and_gives_at_least_one(ratio, k):
    method, state = start("fslora")
    turn = take_turn(method, state, LARGE, budget=Budget(rank=99, ratio=ratio))

    assert turn.dispatch.rank == k
    assert turn.dispatch.scale == pytest.approx(SCALE * RANK / k)


def test_rounding_never_costs_a_rank():
    """In floating point 49 * (k / 49) may lie below k; still k ranks are drawn."""
    method, state = start("fslora", rank=49)
    drawn = [take_turn(method, state, LARGE, budget=Budget(rank=1, ratio=k / 49)).dispatch.rank for k in range(1, 50)]

    assert any(int(49 * (k / 49)) < k for k in range(1, 50))
    assert drawn == list(range(1, 50))


@pytest.mark.parametrize("rank", [0, -1, RANK + 1])
def test_ranks_outside_the_adapter_are_refused(rank):
    """With k = 0 the factor r / k is undefined, and there are no more than r columns to draw."""
    method, state = start("fslora")

    with pytest.raises(AdapterError, match=f"'large' of profile 'server' has rank {rank}, .* rank 8"):
        take_turn(method, state, LARGE, budget=Budget(rank=rank))
