"""FedEx-LoRA: factors are averaged, and what that loses is added to the base weights.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models,
arXiv:2410.09432; read from the released code and digests, equation numbers UNCONFIRMED.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round        server
    Res = sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B) (A_k - A)                                        server
    W <- W + s Res, and all go on from (A, B): W + s (Res + B A) holds the exact mean of the products    everybody

Res is never formed. Since sum_k p_k (B_k - B) = 0, one client j drops out of the sum, and the rest is a piece of a
patch of rank (K - 1) r in factored form (own derivation):

    Res = sum_{k != j} (B_k - B) (p_k A_k - p_k A_j)

j is the client with the largest weight. Shapes: A_k and A are (r, d_in), B_k and B are (d_out, r).
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.algebra import lift_product, stacked_svd
from fedloom.methods.sending import whole
from fedloom.methods.sums import adapter_of, first_state, means, patched, total_weight, widened
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedExLoRA:
    """Averages factors by number of examples and keeps the residual of the products as a patch.

    Attributes:
        residual_rank: the most directions of a round's residual that are kept per module, those of the largest
            singular values; ``None`` keeps the residual exactly.
    """

    residual_rank: Annotated[int, Field(ge=1)] | None = None

    traits: ClassVar[Traits] = Traits(
        title="FedEx-LoRA",
        paper="arXiv:2410.09432",
        heterogeneous=False,
        global_rank="min",
        exact="yes: what averaging loses is patched",
        down="adapter of rank r, head, missed pieces of the patch",
        up="adapter of rank r, head",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        patch="(K - 1) r",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0; the patch is empty."""
        return replace(first_state(template, generator), patch=Patch(scale=template.scale))

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the mean adapter; the platform ships the residuals that the client has missed."""
        return whole(state)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times every tensor for the means; the factors and n_k for the residual."""
        rows = {"weight": torch.tensor([weight], dtype=torch.float64)}
        return replace(lift_product(payload, weight), sums=widened(payload.tensors), rows=rows)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means, and append the residual to the patch."""
        adapter = adapter_of(means(merged, state.adapter.tensors()), state.adapter)
        shares = merged.rows["weight"] / total_weight(merged)
        stacks = {m: Factors(B=stack.B, A=stack.A / merged.weight) for m, stack in merged.stacks.items()}
        piece = {m: self._cut(residual(stack, adapter.factors[m].B, shares)) for m, stack in stacks.items()}
        return replace(state, round=state.round + 1, adapter=adapter, patch=patched(state, piece))

    def _cut(self, factors: Factors) -> Factors:
        if self.residual_rank is None or factors.rank <= self.residual_rank:
            return factors
        U, sigma, Vt = stacked_svd(factors.B, factors.A, self.residual_rank)
        return Factors(B=U * sigma, A=Vt)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter over the residuals."""
        return state.adapter, state.patch


def residual(stack: Factors, mean: Tensor, shares: Tensor) -> Factors:
    """Return factors of rank (K - 1) r whose product is ``sum_k p_k B_k A_k - B A``.

    Args:
        stack: B_k side by side, (d_out, K r), and p_k A_k on top of each other, (K r, d_in).
        mean: B, (d_out, r).
        shares: p_k, float64 of shape (K,); they sum to 1.
    """
    count, rank = len(shares), mean.shape[1]
    heaviest = int(shares.argmax())
    others = [index for index in range(count) if index != heaviest]
    B = stack.B.reshape(-1, count, rank)[:, others] - mean[:, None]
    A = stack.A.reshape(count, rank, -1)
    ratios = (shares[others] / shares[heaviest]).to(A)
    return Factors(B=B.flatten(1), A=(A[others] - ratios[:, None, None] * A[heaviest]).flatten(0, 1))
