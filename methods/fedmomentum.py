"""FedMomentum: the largest directions of the mean of products are trained on, the rest goes into the base weights.

FedMomentum, arXiv:2603.08014; known from its abstract, equation numbers UNCONFIRMED.

    W = sum_k p_k B_k A_k = U diag(sigma) V^T,   p_k = n_k / sum_j n_j over the clients of the round     server
    B = U diag(sigma)^(1/2),   A = diag(sigma)^(1/2) V^T   of the first r directions                     server
    W_base <- W_base + s (the other directions), and all go on from (A, B)                               everybody

Nothing is lost: base and adapter together hold the exact mean. The paper takes a randomised SVD, for which the exact
one of :mod:`fedloom.methods.algebra` stands here; how it shares sigma between the factors is UNCONFIRMED. Shapes: A is
(r, d_in), B is (d_out, r); the piece of the patch has rank (K - 1) r at most.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.algebra import balanced_svd, lift_product
from fedloom.methods.sending import whole
from fedloom.methods.sums import first_state, head_means, patched, refilled, total_weight
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedMomentum:
    """Averages products by number of examples and patches what the adapter's rank does not hold. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FedMomentum",
        paper="arXiv:2603.08014",
        heterogeneous=False,
        global_rank="min",
        exact="yes: what the rank does not hold is patched",
        down="the first r singular directions, head, missed pieces of the patch",
        up="adapter of rank r, head",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        patch="at most (K - 1) r",
        server="O(R^2 P + M R^3)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0; the patch is empty."""
        return replace(first_state(template, generator), patch=Patch(scale=template.scale))

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the adapter; the platform ships the pieces that the client has missed."""
        return whole(state)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the factors for the stack, n_k on the side of A, and n_k times the head."""
        return lift_product(payload, weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Decompose the mean product of every module: r directions to train, the rest to the patch."""
        weight = total_weight(merged)
        first, rest = {}, {}
        for module, rank in state.adapter.ranks.items():
            stack = merged.stacks[module]
            pair = balanced_svd(Factors(B=stack.B, A=stack.A / weight), None)
            first[module] = pair.first(rank)
            rest[module] = Factors(B=pair.B[:, rank:], A=pair.A[rank:])
        adapter = replace(state.adapter, factors=refilled(state, first), head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter, patch=patched(state, rest))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the adapter over the patch."""
        return state.adapter, state.patch
