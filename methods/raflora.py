"""raFLoRA: the mean of products, each rank partition averaged over those clients alone that hold it.

raFLoRA, arXiv:2602.13486; known from notes and a third party's code, equation numbers UNCONFIRMED. With the clients'
rank levels l < h sorted, and N_h = sum of n_k over the clients of the round with r_k >= h::

    W = sum_h sum_{k: r_k >= h} (n_k / N_h) B_k[:, l:h] A_k[l:h, :]                                      server
    W = U diag(sigma) V^T,   B = U diag(sigma)^(1/2),   A = diag(sigma)^(1/2) V^T,  the first r          server
    client i gets  B[:, :r_i], A[:r_i, :]                                                                server

Within a partition the holders are the same, so that each index j may be divided by the examples N_j of its own holders
and no levels have to be configured. FlexLoRA divides by the examples of all clients, and so loses what few hold.

Directions that nobody of a round holds stay in W as they are on the server: ours; what the paper does then is
UNCONFIRMED. W is never formed where the stack of factors is thin: see :mod:`fedloom.methods.algebra`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.algebra import balanced_svd, lift_product
from fedloom.methods.sending import prefix
from fedloom.methods.sums import first_state, head_means, holders, refilled
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class RaFLoRA:
    """Averages products by partition and number of examples, and cuts them by singular value. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="raFLoRA",
        paper="arXiv:2602.13486",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="of each partition over its holders, up to the cut at rank r",
        down="the first r_k singular directions, head",
        up="adapter of rank r_k, head",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O(R^2 P + M R^3)",
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
        """Return the factors for the stack, n_k on the side of A, the index of each of its rows, and the holders."""
        one = lift_product(payload, weight)
        held = holders(payload.tensors, dispatch.global_rank)
        rows = {f"index.{module}": torch.arange(pair.rank) for module, pair in one.stacks.items()}
        return replace(one, sums={**one.sums, **held}, rows=rows)

    def finish(self, state: State, merged: Partial) -> State:
        """Divide each row by the examples of its holders, decompose, and keep the first r directions."""
        factors = {}
        for module, old in state.adapter.factors.items():
            stack, held = merged.stacks[module], merged.sums[f"held.{module}"]
            A = stack.A / held[merged.rows[f"index.{module}"]].to(stack.A)[:, None]
            absent = (held == 0).to(old.A.device)
            B, A = torch.cat([stack.B, old.B[:, absent]], dim=1), torch.cat([A, old.A[absent]])
            factors[module] = balanced_svd(Factors(B=B, A=A), old.rank)
        adapter = replace(state.adapter, factors=refilled(state, factors), head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the best approximation of W of rank r."""
        return state.adapter, None
