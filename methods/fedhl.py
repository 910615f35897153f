"""FedHL: the server keeps the whole sum of what clients learn; each trains the best approximation of its own rank.

FedHL, arXiv:2505.18494; known from notes and a third party's port, equation numbers UNCONFIRMED. The paper's p_k come
from a bound on the clients' drift, which was not at hand: here they are shares of examples.

    client k trains  B_k A_k  from the best approximation trunc_{r_k}(W) of rank r_k                     client
    W <- W + sum_k p_k (B_k A_k - trunc_{r_k}(W)),   p_k = n_k / sum_j n_j over the round                server

A client is charged only with what it changed, so that what its rank did not show it stays. W is kept as the factors of
its singular values, B = U diag(sigma)^(1/2) and A = diag(sigma)^(1/2) V^T: trunc_{r_k} is a prefix, and with h_j the
share of the examples of clients with r_k >= j

    W <- sum_j (1 - h_j) B[:, j] A[j, :] + sum_k p_k B_k A_k

is decomposed again without being formed. Its rank grows by up to R = sum_k r_k in every round, until it is full.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.algebra import balanced_svd, beside_untouched, lift_product
from fedloom.methods.sending import prefix
from fedloom.methods.sums import first_state, head_means, holders, refilled, total_weight
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedHL:
    """Adds what clients change to a model that is never cut. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FedHL",
        paper="arXiv:2505.18494",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="yes, of the changes: nothing is cut on the server",
        down="the first r_k singular directions, head",
        up="adapter of rank r_k, head",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O((q + R)^2 P + M (q + R)^3), q being the rank of W",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0. Round 0 hands out prefixes of it: a zero product has no directions."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the first r_k directions, of every module its own r_k."""
        return prefix(state, client, budget)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the factors for the stack, n_k on the side of A, the head, and which directions were sent."""
        one = lift_product(payload, weight)
        return replace(one, sums={**one.sums, **holders(payload.tensors, dispatch.global_rank)})

    def finish(self, state: State, merged: Partial) -> State:
        """Take what was sent out of W, add what came back, and decompose."""
        weight = total_weight(merged)
        stacks = beside_untouched(state, merged).stacks
        factors = {m: balanced_svd(Factors(B=stack.B, A=stack.A / weight), None) for m, stack in stacks.items()}
        adapter = replace(state.adapter, factors=refilled(state, factors), head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return W, of whatever rank it has."""
        return state.adapter, None
