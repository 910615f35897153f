"""SOFT: which ranks are sent, what norms know of singular values, and what an unsent rank counts as."""

from dataclasses import replace

import pytest
import torch
from rounds import (
    CLIENTS,
    HEAD,
    LARGE,
    MIDDLE,
    RANK,
    SHAPES,
    SMALL,
    apart,
    exported,
    gaussian,
    mean_product,
    play,
    start,
    take_turn,
    untouched,
)

from fedloom.methods.soft import most_important
from fedloom.platform.adapter import Factors
from fedloom.platform.client import Budget
from fedloom.platform.method import Penalty
from fedloom.platform.partial import merge


def importances(pair):
    return pair.B.norm(dim=0) * pair.A.norm(dim=1)


def orthogonal(rank, *, d_out=18, d_in=30):
    """Return factors whose columns and rows are orthogonal, with norms that fall in no order."""
    sizes = 1 + gaussian(rank).abs()
    B, A = torch.linalg.qr(gaussian(d_out, rank)).Q, torch.linalg.qr(gaussian(d_in, rank, seed=1)).Q.T
    return Factors(B=B * sizes, A=A * sizes.flip(0)[:, None])


def without(pair, mask):
    """Return the factors with the ranks outside the mask set to zero."""
    return Factors(B=pair.B * mask, A=pair.A * mask[:, None])


def test_the_error_of_separate_means_is_the_covariance():
    """sum_k w_k B_k A_k = Bbar Abar + sum_k w_k (B_k - Bbar)(A_k - Abar)."""
    method, state = start("soft", {"keep_ratio": 1.0})
    after, turns = play(method, state)

    for module, mean in after.adapter.factors.items():
        covariance = sum(
            turn.client.num_examples
            / 60
            * (turn.trained.factors[module].B - mean.B)
            @ (turn.trained.factors[module].A - mean.A)
            for turn in turns
        )
        torch.testing.assert_close(mean_product(turns, module), mean.product() + covariance)


@pytest.mark.parametrize("count", range(1, 8))
def test_what_is_dropped_is_the_sum_of_the_dropped_terms(count):
    """B A - B_S A_S = sum_{i not in S} b_i a_i, and the bound by the coherences holds for the norm of that sum."""
    pair = Factors(B=gaussian(18, 8), A=gaussian(8, 30))
    mask = most_important(pair, count)
    dropped = [(pair.B[:, [i]] @ pair.A[[i]], float(importances(pair)[i])) for i in range(8) if not mask[i]]

    error = pair.product() - without(pair, mask).product()

    torch.testing.assert_close(error, sum(term for term, _ in dropped))
    sizes = [size for _, size in dropped]
    slack = coherence(pair.A) * coherence(pair.B.T) * sum(sizes) ** 2
    assert abs(torch.linalg.norm(error) ** 2 - sum(size**2 for size in sizes)) <= slack + 1e-9


def coherence(rows):
    rows = rows / rows.norm(dim=1, keepdim=True)
    return float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


@pytest.mark.parametrize("count", range(1, 9))
def test_for_orthogonal_factors_the_norms_are_the_singular_values(count):
    """Then keeping the most important ranks is the best cut there is: its error is Eckart and Young's."""
    pair = orthogonal(8)
    values = torch.linalg.svdvals(pair.product())[:8]
    error = torch.linalg.norm(pair.product() - without(pair, most_important(pair, count)).product())

    torch.testing.assert_close(importances(pair).sort(descending=True).values, values)
    torch.testing.assert_close(error, torch.linalg.norm(values[count:]))


@pytest.mark.parametrize("count", range(1, 8))
def test_for_other_factors_the_best_cut_is_better(count):
    pair = Factors(B=gaussian(18, 8), A=gaussian(8, 30))
    values = torch.linalg.svdvals(pair.product())
    error = torch.linalg.norm(pair.product() - without(pair, most_important(pair, count)).product())

    assert error > torch.linalg.norm(values[count:]) * (1 + 1e-6)


def test_importance_does_not_depend_on_how_a_term_is_split():
    """(b / c)(c a) is the same term: the choice does not change, as it would with a sum of squared norms."""
    pair = Factors(B=gaussian(18, 8), A=gaussian(8, 30))
    c = torch.logspace(3, -3, 8, dtype=torch.float64)
    other = Factors(B=pair.B / c, A=pair.A * c[:, None])

    for count in range(1, 9):
        assert torch.equal(most_important(pair, count), most_important(other, count))
    by_squares = (other.B.norm(dim=0) ** 2 + other.A.norm(dim=1) ** 2).argsort(descending=True)[:3]
    assert set(by_squares.tolist()) != set(most_important(pair, 3).nonzero()[:, 0].tolist())


def test_of_equals_the_first_are_kept():
    """Before training all importances are zero: the choice is by index, and nothing is undefined."""
    method, state = start("soft")
    turn = take_turn(method, state, MIDDLE, train=untouched)

    for mask in turn.payload.masks.values():
        assert mask.tolist() == [True] * 4 + [False] * 4
    assert all(torch.isfinite(tensor).all() for tensor in turn.payload.tensors.values())


def test_a_dropped_rank_is_dropped_from_both_factors():
    """Column i of B and row i of A go together, the rest arrive unchanged and in order."""
    method, state = start("soft")
    turn = take_turn(method, state, MIDDLE)
    merged = merge([turn.partial])

    for module, pair in turn.trained.factors.items():
        mask = turn.payload.masks[module]
        kept, left = importances(pair)[mask], importances(pair)[~mask]
        assert kept.min() > left.max()
        torch.testing.assert_close(merged.sums[f"{module}.B"], 30 * without(pair, mask).B)
        torch.testing.assert_close(merged.sums[f"{module}.A"], 30 * without(pair, mask).A)


@pytest.mark.parametrize(
    ("options", "budget", "kept"),
    [
        ({}, Budget(rank=2), 2),
        ({}, Budget(rank=8), 8),
        ({}, Budget(rank=99), 8),
        ({}, Budget(rank=2, ratio=0.75), 6),
        ({}, Budget(rank=2, ratio=0.7499), 5),
        ({"keep_ratio": 0.5}, Budget(rank=2, ratio=0.75), 4),
        ({"keep_ratio": 0.375}, Budget(rank=8), 3),
        ({"keep_ratio": 0.01}, Budget(rank=8), 1),
    ],
)
def test_the_ratio_is_the_options_else_the_budgets_else_that_of_the_ranks(options, budget, kept):
    """Rounded down, so that a deadline is never missed for it, but never below one rank per module."""
    method, state = start("soft", options)
    turn = take_turn(method, state, LARGE, budget=budget)

    assert {int(mask.sum()) for mask in turn.payload.masks.values()} == {kept}
    assert set(turn.trained.ranks.values()) == {RANK}


def test_rounding_never_costs_a_rank():
    """In floating point (k / 49) * 49 may lie below k; still k ranks are sent."""
    method, state = start("soft", rank=49)
    sent = [take_turn(method, state, replace(LARGE, rank=k)).payload.masks["layers.0.q"].sum() for k in range(1, 50)]

    assert any(int(k / 49 * 49) < k for k in range(1, 50))
    assert sent == list(range(1, 50))


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
def test_the_upload_is_the_kept_values_and_a_bit_per_rank(client):
    """4 kept (d_out + d_in) bytes and ceil(r / 8) per module, and the head."""
    method, state = start("soft", dtype=torch.float32)
    turn = take_turn(method, state, client)
    head = 4 * sum(tensor.numel() for tensor in state.adapter.head.values())

    assert turn.payload.num_bytes == sum(4 * client.rank * sum(shape) + 1 for shape in SHAPES.values()) + head


def test_without_penalty_and_with_every_rank_it_is_federated_averaging():
    """With rho = 1 and lambda = 0 there is nothing left of SOFT: three rounds give FedIT's model."""
    method, state = start("soft", {"keep_ratio": 1.0, "orthogonality": 0.0})
    plain, other = start("fedit")
    for _ in range(3):
        state, turns = play(method, state)
        other, _ = play(plain, other)
        assert all(turn.dispatch.penalty is None for turn in turns)

    assert apart(exported(method, state), exported(plain, other)) < 1e-14


def test_the_penalty_is_shared_out_among_the_modules():
    method, state = start("soft", {"orthogonality": 0.6})

    assert take_turn(method, state, SMALL).dispatch.penalty == Penalty(name="orthogonality", weight=0.6 / len(SHAPES))


def test_zero_fill_shrinks_a_rank_by_the_share_that_sent_it():
    """A rank sent by the share f of the weight is f times its mean in both factors, so f^2 in the product."""
    method, state = start("soft")
    state, _ = play(method, state)
    after, turns = play(method, state, train=untouched)

    for module, old in state.adapter.factors.items():
        share = sum(turn.client.num_examples / 60 * turn.payload.masks[module].double() for turn in turns)
        new = after.adapter.factors[module]
        torch.testing.assert_close(new.B, old.B * share)
        torch.testing.assert_close(new.A, old.A * share[:, None])
        assert sorted({round(float(part), 6) for part in share}) == [0.333333, 0.833333, 1.0]


def test_keep_old_adds_the_sent_differences():
    """B = B_old + sum_k w_k dB_k M_k; a rank that nobody sent stays to the bit."""
    method, state = start("soft", {"aggregation": "keep_old"})
    state, _ = play(method, state)
    cohort = (SMALL, replace(SMALL, id="other"))
    after, turns = play(method, state, cohort)

    for module, old in state.adapter.factors.items():
        moves = [(turn.payload.masks[module], turn.trained.factors[module]) for turn in turns]
        expected = old.B + sum(mask * (pair.B - old.B) for mask, pair in moves) / 2
        torch.testing.assert_close(after.adapter.factors[module].B, expected)
        unsent = ~(moves[0][0] | moves[1][0])
        assert unsent.any()
        assert torch.equal(after.adapter.factors[module].A[unsent], old.A[unsent])


def test_masked_mean_is_over_those_who_sent_a_rank():
    """Divided by the weight that sent it; a rank that nobody sent keeps the server's values."""
    method, state = start("soft", {"aggregation": "masked_mean"})
    state, _ = play(method, state)
    cohort = (SMALL, MIDDLE)
    after, turns = play(method, state, cohort)
    seen = set()

    for module, old in state.adapter.factors.items():
        for rank in range(RANK):
            senders = [turn for turn in turns if turn.payload.masks[module][rank]]
            total = sum(turn.client.num_examples for turn in senders)
            parts = [turn.client.num_examples * turn.trained.factors[module].A[rank] for turn in senders]
            expected = sum(parts) / total if senders else old.A[rank]
            torch.testing.assert_close(after.adapter.factors[module].A[rank], expected)
            seen.add(len(senders))

    assert {0, 1} <= seen


@pytest.mark.parametrize("aggregation", ["zero_fill", "keep_old", "masked_mean"])
def test_the_head_is_averaged_by_examples(aggregation):
    method, state = start("soft", {"aggregation": aggregation})
    after, turns = play(method, state)

    for name in HEAD:
        small, middle, large = (turn.trained.head[name] for turn in turns)
        torch.testing.assert_close(after.adapter.head[name], small / 6 + middle / 2 + large / 3)


@pytest.mark.parametrize("client", [SMALL, MIDDLE, LARGE], ids=lambda client: client.id)
def test_with_error_feedback_what_is_sent_and_what_is_kept_are_what_was_trained(client):
    """Sent + memory = change + memory of before, in every round; a rank is either kept or sent."""
    method, state = start("soft", {"aggregation": "error_feedback"})
    memory = {}
    for _ in range(4):
        turn = take_turn(method, state, replace(client, memory=memory))
        kept = method.remember(turn.dispatch, turn.trained)
        sent = method.lift(turn.dispatch, turn.payload, 1.0).sums
        for module, pair in turn.trained.factors.items():
            for name in "BA":
                key = f"{module}.{name}"
                owed = memory.get(f"{key}.unsent", torch.zeros(()))
                trained = getattr(pair, name) - state.adapter.tensors()[key]
                torch.testing.assert_close(sent[key] + kept[f"{key}.unsent"], trained + owed)
                assert not (sent[key] * kept[f"{key}.unsent"]).any()
        state, memory = method.finish(state, turn.partial), kept
    assert any(tensor.any() for tensor in memory.values()) == (client.rank < RANK)


def test_error_feedback_sends_the_ranks_that_matter_once_what_is_owed_is_added():
    """Untrained, a client sends what it owes: the largest ranks of what it received and owes together."""
    method, state = start("soft", {"aggregation": "error_feedback"})
    state, _ = play(method, state)
    turn = take_turn(method, state, SMALL)
    owed = method.remember(turn.dispatch, turn.trained)
    again = take_turn(method, state, replace(SMALL, memory=owed), train=untouched)

    for module, pair in again.trained.factors.items():
        B, A = pair.B + owed[f"{module}.B.unsent"], pair.A + owed[f"{module}.A.unsent"]
        norms = B.norm(dim=0) * A.norm(dim=1)
        assert set(norms.topk(2).indices.tolist()) == set(again.payload.masks[module].nonzero()[:, 0].tolist())
        torch.testing.assert_close(
            again.payload.tensors[f"{module}.B"], owed[f"{module}.B.unsent"][:, again.payload.masks[module]]
        )
