"""Per-index averaging: every direction over its holders, and nobody else."""

import torch
from rounds import CLIENTS, MIDDLE, RANK, SMALL, apart, exported, play, start


def over_holders(old, turns, module):
    """Average entry by entry, with plain numbers."""
    B, A = old.B.clone(), old.A.clone()
    for j in range(old.rank):
        held = [(t.client.num_examples, t.trained.factors[module]) for t in turns if t.client.rank > j]
        total = sum(count for count, _ in held)
        for i in range(len(B)):
            if held:
                B[i, j] = sum(count / total * float(own.B[i, j]) for count, own in held)
        for i in range(A.shape[1]):
            if held:
                A[j, i] = sum(count / total * float(own.A[j, i]) for count, own in held)
    return B, A


def test_each_index_is_the_mean_over_its_holders():
    """Indices 1 and 2 over 60 examples, 3 and 4 over 50, the rest is the large client's alone."""
    method, state = start("per_index")
    state, _ = play(method, state)
    after, turns = play(method, state)

    for module, pair in after.adapter.factors.items():
        B, A = over_holders(state.adapter.factors[module], turns, module)
        torch.testing.assert_close(pair.B, B)
        torch.testing.assert_close(pair.A, A)
        torch.testing.assert_close(pair.B[:, 4:], turns[2].trained.factors[module].B[:, 4:], rtol=1e-14, atol=0)


def test_what_nobody_holds_stays_bit_for_bit():
    method, state = start("per_index")
    state, _ = play(method, state)
    after, turns = play(method, state, [SMALL, MIDDLE])

    for module, pair in after.adapter.factors.items():
        old = state.adapter.factors[module]
        assert torch.equal(pair.B[:, 4:], old.B[:, 4:])
        assert torch.equal(pair.A[4:], old.A[4:])
        B, A = over_holders(old, turns, module)
        torch.testing.assert_close((pair.B, pair.A), (B, A))


def test_at_equal_ranks_it_is_fedit():
    cohort = [type(c)(id=c.id, profile=c.profile, rank=RANK, num_examples=c.num_examples) for c in CLIENTS]
    models = []
    for name in ("per_index", "fedit"):
        method, state = start(name)
        models.append(exported(method, play(method, state, cohort)[0]))

    assert apart(*models) < 1e-12
