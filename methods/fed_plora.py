"""Fed-PLoRA: every client trains some of the server's rank-1 pairs, with all the others at work beside them.

Fed-PLoRA, arXiv:2602.16936 (ICLR 2026); known from digests, equation numbers and defaults UNCONFIRMED.

    J_k: r_k of the r indices, uniform without replacement, a draw of its own for every round            server
    client k trains  B_k, A_k  from B[:, J_k], A[J_k, :]  over the frozen  W + s sum_{j not in J_k} B[:, j] A[j, :]
    C_j = the clients of the round with j in J_k,   N_j = sum_{k in C_j} n_k                             server
    B[:, j] = sum_{k in C_j} (n_k / N_j) B_k[:, j],   A[j, :] likewise; where C_j is empty both stay     server

A client starts from exactly the server's model, whatever its rank. In the paper clients draw J_k and send the indices;
here the server draws and sends the seed, eight bytes. Whether modules share J_k is UNCONFIRMED; here each has its own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.sending import whole
from fedloom.methods.sums import draw_seed, first_state, heads, over_holders, refuse_larger_rank, wide
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.seeds import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class FedPLoRA:
    """Trains random rank-1 pairs and averages each over those who trained it. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="Fed-PLoRA",
        paper="arXiv:2602.16936",
        heterogeneous=True,
        global_rank="max",
        exact="no: factors are averaged apart",
        down="adapter of rank r, a seed, head",
        up="r_k random columns and rows, trained, head",
        bytes_down="4 (r P + H) + 8",
        bytes_up="4 (r_k P + H)",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send all pairs, and the seed of those that are trained."""
        every = whole(state)
        refuse_larger_rank(client, budget.rank, every.rank)
        seed = draw_seed(generator)
        return replace(
            every,
            payload=replace(every.payload, seeds={"pairs": seed}),
            rank=budget.rank,
            trained={module: pairs(seed, module, budget.rank, every.rank) for module in state.adapter.factors},
            shared=None,
        )

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained pairs."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times the pairs, each at its index, the head, and what says who trained which."""
        rank, sums = dispatch.global_rank, heads(payload.tensors)
        for module, own in Adapter.from_tensors(payload.tensors, dispatch.scale).factors.items():
            index = torch.tensor(dispatch.trained[module], device=own.A.device)
            B, A = wide(own.B), wide(own.A)
            sums[f"{module}.B"] = B.new_zeros(len(B), rank).index_copy(1, index, B)
            sums[f"{module}.A"] = A.new_zeros(rank, A.shape[1]).index_copy(0, index, A)
            sums[f"held.{module}"] = torch.zeros(rank, dtype=torch.float64).index_fill(0, index.cpu(), 1.0)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the mean of every pair over those who trained it."""
        return replace(state, round=state.round + 1, adapter=over_holders(state, merged))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return all pairs."""
        return state.adapter, None


def pairs(seed: int, module: str, count: int, rank: int) -> tuple[int, ...]:
    """Return J, ascending. The order is kept so that all pairs of a client of rank r are the whole adapter."""
    drawn = torch.randperm(rank, generator=generator_for("pairs", seed, module))[:count]
    return tuple(sorted(drawn.tolist()))
