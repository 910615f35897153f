"""FedRot-LoRA: clients rotate their factors towards the server's before they are averaged.

FedRot-LoRA, arXiv:2602.23638 (ICML 2026); read from the released code and digests, equation numbers UNCONFIRMED. B A is
the same for all (B R, R^T A) with R orthogonal, but the means of the factors are not. With (B_s, A_s) as received::

    after the first round  R_k = argmin_R ||R^T A_k - A_s||_F   or   argmin_R ||B_k R - B_s||_F      client
        in turns, by the SVD  U S V^T = A_k A_s^T  (or B_k^T B_s):   R = U V^T
    R_k <- the orthogonal matrix next to (1 - lambda) I + lambda R_k                                            client
    B_k <- B_k R_k,   A_k <- R_k^T A_k                                                                          client
    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round               server

With rounds counted from 1 the first rotates nothing, even ones align B and odd ones A; whether paper and code count so
is UNCONFIRMED. Shapes: A_k is (r, d_in), B_k is (d_out, r), R_k is (r, r).
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.sending import whole
from fedloom.methods.sums import adapter_of, first_state, means, widened
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedRot:
    """Averages aligned factors, and the head, by number of examples.

    Attributes:
        strength: lambda; 1 aligns as far as a rotation can, 0 is FedIT.
        reflections: whether R may have the determinant -1, as the released code lets it; the paper's rotations have +1.
    """

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    reflections: bool = False

    traits: ClassVar[Traits] = Traits(
        title="FedRot-LoRA",
        paper="arXiv:2602.23638",
        heterogeneous=False,
        global_rank="min",
        exact="no: factors are averaged apart, but aligned",
        down="adapter of rank r, head",
        up="the same, trained and rotated",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the whole adapter: it is what clients align to."""
        return replace(whole(state), round=state.round)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter, rotated; its products are those of training. Round 0 rotates nothing."""
        if dispatch.round == 0:
            return Payload(tensors=trained.tensors())
        received = Adapter.from_tensors(dispatch.payload.tensors, dispatch.scale).factors
        factors = {}
        for module, own in trained.factors.items():
            R = self.rotation(own, received[module], by_rows=dispatch.round % 2 == 0)
            factors[module] = Factors(B=(own.B.double() @ R).to(own.B), A=(R.T @ own.A.double()).to(own.A))
        return Payload(tensors=replace(trained, factors=factors).tensors())

    def rotation(self, own: Factors, received: Factors, *, by_rows: bool) -> Tensor:
        """Return R, float64 of (r, r), that aligns the rows of A, or else the columns of B, to what was received."""
        left, right = (own.A, received.A.T) if by_rows else (own.B.T, received.B)
        agreement = left.double() @ right.double()
        R = nearest(agreement, reflections=self.reflections)
        if self.strength == 1:
            return R
        eye = torch.eye(len(R)).to(R)
        return nearest((1 - self.strength) * eye + self.strength * R, reflections=self.reflections)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times every tensor."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means."""
        new = means(merged, state.adapter.tensors())
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter."""
        return state.adapter, None


def nearest(matrix: Tensor, *, reflections: bool) -> Tensor:
    """Return the orthogonal matrix nearest to ``matrix`` (r, r); without ``reflections`` the nearest rotation."""
    U, _, Vt = torch.linalg.svd(matrix)
    if not reflections and torch.linalg.det(U @ Vt) < 0:
        U = torch.cat([U[:, :-1], -U[:, -1:]], dim=1)  # of all directions the last one agrees least
    R: Tensor = U @ Vt
    return R
