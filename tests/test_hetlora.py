"""HetLoRA: weights by the norms of products, and a penalty on the tail."""

import math
from dataclasses import replace

import pytest
import torch
from rounds import CLIENTS, LARGE, RANK, SMALL, apart, exported, factors, gaussian, play, start, take_turn, untouched

from fedloom.methods.hetlora import product_norm
from fedloom.platform.adapter import Adapter
from fedloom.platform.client import Budget
from fedloom.platform.penalties import tail
from fedloom.platform.wire import dispatch_from, dispatch_header


def dense_norm(adapter):
    return math.sqrt(sum(float(torch.linalg.norm(pair.product())) ** 2 for pair in adapter.factors.values()))


def test_the_norm_is_that_of_the_products_formed_in_full():
    adapter = Adapter(factors={"a": factors(7, 3, 9), "b": factors(5, 2, 4, seed=5)}, head={}, scale=3.0)

    assert float(product_norm(adapter)) == pytest.approx(dense_norm(adapter), rel=1e-12)


def test_factors_are_weighted_by_the_norms_of_their_products_and_the_head_by_examples():
    method, state = start("hetlora")
    for _ in range(2):
        state, turns = play(method, state)
    norms = [dense_norm(turn.trained) for turn in turns]
    for module, pair in state.adapter.factors.items():
        B, A = torch.zeros_like(pair.B), torch.zeros_like(pair.A)
        for norm, turn in zip(norms, turns, strict=True):
            own = turn.trained.factors[module]
            B[:, : own.rank] += norm / sum(norms) * own.B
            A[: own.rank] += norm / sum(norms) * own.A
        torch.testing.assert_close(pair.B, B)
        torch.testing.assert_close(pair.A, A)
    for part in state.adapter.head:
        small, middle, large = (turn.trained.head[part] for turn in turns)
        torch.testing.assert_close(state.adapter.head[part], small / 6 + middle / 2 + large / 3)


def test_with_equal_ranks_and_equal_norms_it_is_fedit():
    """Equal products, equal weights: what every client sends is one adapter, whose directions have other signs."""

    def train(received, dispatch, client, number):
        sign = -1 if client.id == "small" else 1
        pairs = {m: type(p)(B=sign * gaussian(*p.B.shape), A=sign * p.A) for m, p in received.factors.items()}
        return Adapter(factors=pairs, head=received.head, scale=received.scale)

    cohort = [type(client)(id=client.id, profile="p", rank=RANK, num_examples=10) for client in CLIENTS]
    models = []
    for name in ("hetlora", "fedit"):
        method, state = start(name)
        models.append(exported(method, play(method, state, cohort, train=train)[0]))

    assert apart(*models) < 1e-12


def test_where_every_product_is_zero_the_factors_stay():
    method, state = start("hetlora")
    after, _ = play(method, state, train=untouched)

    assert all(torch.equal(t, after.adapter.tensors()[n]) for n, t in state.adapter.tensors().items() if n[-1] in "AB")


@pytest.mark.parametrize(("keep", "first"), [(0.99, 4), (0.5, 2), (0.2, 1)])
def test_the_penalty_is_the_size_of_the_tail(keep, first):
    """With r = 5 and t = floor(keep r), entry by entry; two modules add up."""
    pairs = [(gaussian(6, 5), gaussian(5, 8)), (gaussian(3, 5, seed=2), gaussian(5, 4, seed=3))]
    expected = 0.0
    for B, A in pairs:
        columns = sum(float(B[i, j]) ** 2 for i in range(len(B)) for j in range(first, 5))
        rows = sum(float(A[j, i]) ** 2 for i in range(A.shape[1]) for j in range(first, 5))
        expected += math.sqrt(columns) * math.sqrt(rows)

    assert float(tail(pairs, keep=keep)) == pytest.approx(expected, rel=1e-12)


def test_the_penalty_pulls_the_tail_alone_and_is_still_where_b_is_zero():
    B, A = (tensor.requires_grad_() for tensor in (gaussian(6, 4), gaussian(4, 8)))
    tail([(B, A)], keep=0.5).backward()
    zero = torch.zeros(6, 4, requires_grad=True)
    tail([(zero, A.detach())], keep=0.5).backward()

    assert not B.grad[:, :2].any()
    assert not A.grad[:2].any()
    assert (B.grad[:, 2:] * B[:, 2:]).sum() > 0
    assert not zero.grad.any()


def shrink(received, dispatch, client, number):
    """Train so that the last directions get smaller."""
    pairs = {m: type(p)(B=0.9 * p.B, A=p.A) for m, p in received.factors.items()}
    return Adapter(factors=pairs, head=received.head, scale=received.scale)


@pytest.mark.parametrize(
    ("gamma", "least", "ranks"),
    [(0.99, 4, (2, 4, 7)), (0.5, 1, (1, 2, 4)), (0.5, 4, (2, 4, 4)), (0.5, None, (2, 4, 8))],
)
def test_a_tail_that_has_shrunk_is_cut_and_stays_cut(gamma, least, ranks):
    """r_k <- max(r_min, floor(gamma r_k)), never more than before; upload, memory and next download agree."""
    method, state = start("hetlora", {"gamma": gamma, "min_rank": least})
    state, _ = play(method, state)
    for client, rank in zip(CLIENTS, ranks, strict=True):
        turn = take_turn(method, state, client, train=shrink)
        memory = method.remember(turn.dispatch, turn.trained)
        again = take_turn(method, state, replace(client, memory=memory), train=untouched)

        assert memory["ranks"].tolist() == [rank] * len(turn.trained.factors)
        assert {n: t.shape for n, t in turn.payload.tensors.items()} == {
            n: t.shape for n, t in turn.trained.first(rank).tensors().items()
        }
        assert again.dispatch.rank == rank
        assert set(again.trained.ranks.values()) == {rank}
        assert method.remember(again.dispatch, again.trained)["ranks"].tolist() == memory["ranks"].tolist()


def test_a_tail_that_grows_or_stays_is_kept():
    method, state = start("hetlora", {"gamma": 0.5, "min_rank": 1})
    state, turns = play(method, state)  # B was zero, so that every tail has grown
    turns += [take_turn(method, state, client, train=untouched) for client in CLIENTS]

    assert all(turn.payload.tensors.keys() == turn.trained.tensors().keys() for turn in turns)
    assert all(set(method.kept_ranks(t.dispatch, t.trained).values()) == {t.client.rank} for t in turns)


def test_ranks_by_module_are_pruned_by_module_and_nobody_shares_their_payload():
    method, state = start("hetlora", {"gamma": 0.5, "min_rank": 1})
    state, _ = play(method, state)
    modules = list(state.adapter.factors)
    budget = Budget(rank=2, ranks={modules[0]: 2, modules[1]: 8, modules[2]: 4})
    turn = take_turn(method, state, SMALL, train=shrink, budget=budget)
    memory = method.remember(turn.dispatch, turn.trained)
    again = take_turn(method, state, replace(SMALL, memory=memory), budget=budget)

    assert memory["ranks"].tolist() == [1, 4, 2]
    assert list(again.trained.ranks.values()) == [1, 4, 2]
    assert (turn.dispatch.shared is None, again.dispatch.shared) == (False, None)


def test_the_penalty_travels_with_its_options():
    method, state = start("hetlora", {"gamma": 0.5, "tail_penalty": 0.01})
    for client in (SMALL, LARGE):
        dispatch = take_turn(method, state, client).dispatch
        assert dispatch_from(dispatch_header(dispatch), dispatch.payload).penalty == dispatch.penalty
        assert (dispatch.penalty.weight, dispatch.penalty.options) == (0.01, {"keep": 0.5})
    assert take_turn(*start("hetlora", {"tail_penalty": 0.0}), SMALL).dispatch.penalty is None
