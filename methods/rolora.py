"""RoLoRA: rounds take turns at training B over a frozen A, and A over a frozen B.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, arXiv:2502.01755 (NeurIPS 2025;
an earlier version is arXiv:2409.02346). Read in digests and in a third party's port; equation numbers are UNCONFIRMED.

    rounds 1, 3, 5, ...   A frozen:  B = sum_k p_k B_k        rounds 2, 4, 6, ...   B frozen:  A = sum_k p_k A_k
    p_k = n_k / sum_j n_j over the clients of the round

Since the frozen factor is common, the mean of the factors is the mean of the products in every round. The first round
trains B: with B = 0 the gradient of A is zero. Shapes: B_k is (d_out, r), A_k is (r, d_in).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.fedit import FedIT
from fedloom.methods.sending import whole
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, State, Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class RoLoRA(FedIT):
    """Averages one factor a round, and the head in every round, by number of examples. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="RoLoRA",
        paper="arXiv:2502.01755",
        heterogeneous=False,
        global_rank="min",
        aligned=True,
        additive="values",
        exact="yes: one factor is common in each round",
        down="adapter of rank r, head",
        up="the factor whose turn it is, head",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r (P_A if t % 2 else P_B) + H)",
        server="O(K r P)",
    )

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send both factors, and which one is trained: clients keep neither between rounds."""
        turn = "A" if state.round % 2 else "B"
        return replace(whole(state), trainable=frozenset({turn, "head"}))
