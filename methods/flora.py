"""FLoRA: the clients' factors are stacked, and the stack is added to the base weights for good.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
arXiv:2409.05976; read from the released code, equation numbers UNCONFIRMED.

    B_stack = [B_1 ... B_K],  A_stack = [p_1 A_1; ...; p_K A_K],  p_k = n_k / sum_j n_j over the round   server
    W <- W + s B_stack A_stack = W + s sum_k p_k B_k A_k                                                 everybody

The weight stands on one factor alone; on both it would be squared. Shapes: B_stack is (d_out, R), A_stack (R, d_in),
R = sum_k r_k. Every round starts from a fresh adapter of the client's own rank: A drawn, B = 0. The weights themselves
are never changed here: the stacks of all rounds form a patch in factored form.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.algebra import lift_product
from fedloom.methods.sending import fresh
from fedloom.methods.sums import first_state, head_means, patched, total_weight
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FLoRA:
    """Stacks the factors by number of examples and averages the head. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FLoRA",
        paper="arXiv:2409.05976",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="yes: stacked",
        down="the seed of a fresh adapter, head, missed pieces of the patch",
        up="adapter of rank r_k, head",
        bytes_down="4 H + 8",
        bytes_up="4 (r_k P + H)",
        patch="R",
        server="none: factors are put side by side",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Return an empty patch and an adapter of rank 0."""
        state = first_state(template, generator)
        return replace(state, adapter=state.adapter.first(0), patch=Patch(scale=template.scale))

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the head and the seed of a fresh adapter; the platform ships the pieces that the client has missed."""
        return fresh(state, budget, generator)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the factors for the stack, n_k on the side of A, and n_k times the head."""
        return lift_product(payload, weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Append the stack to the patch."""
        weight = total_weight(merged)
        piece = {module: Factors(B=stack.B, A=stack.A / weight) for module, stack in merged.stacks.items()}
        adapter = replace(state.adapter, head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter, patch=patched(state, piece))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return an adapter of rank 0 over the patch."""
        return state.adapter, state.patch
