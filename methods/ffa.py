"""FFA-LoRA: A is drawn once and frozen for everybody; B alone is trained, sent and averaged.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, arXiv:2403.12313. The paper was read in digests
only: equation numbers are UNCONFIRMED.

    A_k = A_0 for every client and round, drawn from a seed                                              everybody
    B = sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round                             server

Since A is common, the mean of the factors is the mean of the products, without a cross term:

    sum_k p_k B_k A_0 = B A_0

Shapes: B_k and B are (d_out, r), A_0 is (r, d_in). Every client trains the rank of the server.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.sending import trained_part, whole
from fedloom.methods.sums import adapter_of, first_state, means, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.method import Budget, Client, Dispatch, Partial, Payload, State, Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class FFALoRA:
    """Averages B and the head by number of examples, over a frozen A. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FFA-LoRA",
        paper="arXiv:2403.12313",
        heterogeneous=False,
        global_rank="min",
        aligned=True,
        additive="values",
        exact="yes: A is common",
        down="B, head, the seed of A",
        up="B, head",
        bytes_down="4 (r P_B + H) + 8",
        bytes_up="4 (r P_B + H)",
        server="O(K r P_B)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A from a seed that the state keeps; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send B, the head and the seed of A."""
        frozen = replace(whole(state), trainable=frozenset({"B", "head"}))
        sent = trained_part(frozen, state.adapter)
        return replace(frozen, payload=Payload(tensors=sent, seeds={"fresh": state.seed}))

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send B and the head."""
        return Payload(tensors=trained_part(dispatch, trained))

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times B and the head."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means; A stays."""
        new = {**state.adapter.tensors(), **means(merged, merged.sums)}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean B over the frozen A."""
        return state.adapter, None
