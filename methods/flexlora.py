"""FlexLoRA: the server averages products, and hands each client the best approximation of its own rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
arXiv:2402.11505; read from the released code, equation numbers UNCONFIRMED.

    W = sum_k p_k B_k A_k,   p_k = n_k / sum_j n_j over the clients of the round                         server
    W = U diag(sigma) V^T,   client i gets  B_i = U[:, :r_i] diag(sigma[:r_i]),  A_i = V[:, :r_i]^T      server

All singular values go into B; A has orthonormal rows. (The paper's scale alpha / r_k by client is here the one scale
s of all, so that s B_i A_i is the best rank-r_i approximation of s W.) W is rebuilt from scratch each round; a
direction j is carried only by clients with r_k >= j, so that even without training sigma_j is multiplied by their share
of the weight.

The option ``aggregation: residual`` (ours, not in the paper) does without that loss: clients are charged only with what
they changed, and with h_j the share of the weight of clients with r_k >= j

    W <- W + sum_k p_k (B_k A_k - trunc_{r_k}(W)) = sum_j (1 - h_j) B[:, j] A[j, :] + sum_k p_k B_k A_k   server

W is never formed where the stack of factors is thin: see :mod:`fedloom.methods.algebra`. The server keeps the first
r directions; each client's adapter is a prefix of them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedloom.methods.algebra import beside_untouched, lift_product, mean_product
from fedloom.methods.sending import prefix
from fedloom.methods.sums import first_state, head_means, holders, refilled
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexLoRA:
    """Averages products by number of examples and cuts them by singular value.

    Attributes:
        aggregation: ``products`` rebuilds W from the clients' products, as the paper does; ``residual`` (ours) adds the
            mean of what clients changed to the W that is there, so that nothing fades.
    """

    aggregation: Literal["products", "residual"] = "products"

    traits: ClassVar[Traits] = Traits(
        title="FlexLoRA",
        paper="arXiv:2402.11505",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="up to the cut at rank r",
        down="the first r_k singular directions, head",
        up="adapter of rank r_k, head",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O(R^2 P + M R^3)",
        exceptions={
            "no_op_round": "directions beyond a client's rank lose its weight in every round (31 % in the law's test)"
        },
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0. Round 0 hands out prefixes of it: a zero product has no directions."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the first r_k directions, of every module its own r_k."""
        return prefix(state, client, budget)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter, not a difference."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the factors for the stack, n_k on the side of A, and n_k times the head."""
        one = lift_product(payload, weight)
        if self.aggregation == "products":
            return one
        return replace(one, sums={**one.sums, **holders(payload.tensors, dispatch.global_rank)})

    def finish(self, state: State, merged: Partial) -> State:
        """Decompose the mean product of every module and keep the first r directions."""
        whole = merged if self.aggregation == "products" else beside_untouched(state, merged)
        factors = {module: mean_product(whole, module, rank) for module, rank in state.adapter.ranks.items()}
        adapter = replace(state.adapter, factors=refilled(state, factors), head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the best approximation of W of rank r."""
        return state.adapter, None
