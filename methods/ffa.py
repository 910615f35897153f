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

from fedloom.methods.fedit import FedIT
from fedloom.methods.sending import trained_part, whole
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class FFALoRA(FedIT):
    """Averages B and the head by number of examples, over an A that the state's seed draws. It has no options."""

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

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send B, the head and the seed of A."""
        frozen = replace(whole(state), trainable=frozenset({"B", "head"}))
        sent = trained_part(frozen, state.adapter)
        return replace(frozen, payload=Payload(tensors=sent, seeds={"fresh": state.seed}))
