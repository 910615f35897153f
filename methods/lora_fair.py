"""LoRA-FAIR (LS): factors are averaged, then B is corrected towards the mean of the products.

LoRA-FAIR, arXiv:2411.14961; known from digests, equation numbers UNCONFIRMED. The paper maximises a similarity to the
mean of the products by gradient steps; here its squared distance is minimised in closed form (own derivation), which is
another optimiser and another objective: do not report it under the paper's name alone.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round        server
    D = argmin ||sum_k p_k B_k A_k - (B + D) A||_F^2 + lambda ||D||_F^2                                  server
      = (sum_k p_k B_k (A_k A^T) - B (A A^T)) (A A^T + lambda I)^-1
    all go on from (A, B + D)                                                                            server

Shapes: A is (r, d_in), B and D are (d_out, r); the solve is r x r and no product is formed. lambda -> 0 projects the
mean product onto the rows of A, lambda -> infinity is FedIT. The scale s cancels where it is folded into B.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.algebra import lift_product
from fedloom.methods.fedit import FedIT
from fedloom.methods.sums import adapter_of, means, total_weight, widened
from fedloom.platform.adapter import Factors
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAFair(FedIT):
    """Averages factors by number of examples and corrects B by least squares.

    Attributes:
        ridge: lambda, which keeps the correction small. 0.01 is the paper's weight, of another loss.
    """

    ridge: Annotated[float, Field(gt=0)] = 0.01

    traits: ClassVar[Traits] = Traits(
        title="LoRA-FAIR (LS)",
        paper="arXiv:2411.14961",
        heterogeneous=False,
        global_rank="min",
        changeable=("ridge",),
        exact="no: B is corrected as far as the mean A allows",
        down="adapter of rank r, head",
        up="the same, trained",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        server="O(K r^2 P + M r^3)",
    )

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times every tensor for the means, and the factors for the mean of the products."""
        return replace(lift_product(payload, weight), sums=widened(payload.tensors))

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means and correct B."""
        mean = adapter_of(means(merged, state.adapter.tensors()), state.adapter)
        weight = total_weight(merged)
        factors = {}
        for module, pair in mean.factors.items():
            stack = merged.stacks[module]
            D = correction(Factors(B=stack.B, A=stack.A / weight), pair, self.ridge)
            factors[module] = Factors(B=pair.B + D, A=pair.A)
        return replace(state, round=state.round + 1, adapter=replace(mean, factors=factors))


def correction(stack: Factors, mean: Factors, ridge: float) -> Tensor:
    """Return D, (d_out, r), solved in float64.

    Args:
        stack: B_k side by side, (d_out, K r), and p_k A_k on top of each other, (K r, d_in).
        mean: the mean factors.
        ridge: lambda.
    """
    A, B = mean.A.double(), mean.B.double()
    gram = A @ A.T
    missing = stack.B.double() @ (stack.A.double() @ A.T) - B @ gram
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), missing.T)
    return solved.T.to(mean.B)
