"""Per-index averaging: each rank index is averaged over those clients alone that hold it.

The server of a family of methods; HAFLQ, arXiv:2411.06581, is the member whose id is at hand. RBLA (ICWS 2024) and
RB-LoRA (Findings of EACL 2026) belong to it too. Clients get prefixes here; HAFLQ lets them choose indices by
importance, which is not built. Known from digests and third-party code: equation numbers and defaults UNCONFIRMED.

    client k receives  B[:, :r_k], A[:r_k, :]                                                            server
    C_j = the clients of the round with r_k >= j,   N_j = sum_{k in C_j} n_k                             server
    B[:, j] = sum_{k in C_j} (n_k / N_j) B_k[:, j],   A[j, :] likewise; where C_j is empty both stay     server

Padding with zeros divides by sum_k n_k instead and so shrinks what few hold (:mod:`fedloom.methods.zero_padding`).
Factors are still averaged apart, so that FedIT's covariance error remains. The head is averaged over all.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.sending import prefix
from fedloom.methods.sums import first_state, holders, over_holders, padded
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class PerIndex:
    """Averages each direction over its holders, by number of examples. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="Per-index averaging",
        paper="arXiv:2411.06581",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="no: factors are averaged apart",
        down="the first r_k directions, head",
        up="the same, trained",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the first r_k directions."""
        return prefix(state, client, budget)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times the padded factors, the head, and what says who holds which index."""
        sums = padded(payload.tensors, dispatch.global_rank) | holders(payload.tensors, dispatch.global_rank)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Divide each direction by the examples of its holders; what nobody holds stays."""
        return replace(state, round=state.round + 1, adapter=over_holders(state, merged))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter, of rank r."""
        return state.adapter, None
