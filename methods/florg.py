"""FLoRG: one matrix makes both factors, its Gram matrices are averaged, and a rotation keeps rounds apart from jumping.

FLoRG, arXiv:2602.17095 (ICLR 2026); known from digests and reviews, its code, equation numbers and the weights of the
mean are UNCONFIRMED.

    client k trains  G_k  (the paper's A) in  W + s L (G_k^T G_k - G_0^T G_0) R                          client
    Q = sum_k p_k G_k^T G_k,   p_k = n_k / sum_j n_j over the clients of the round                       server
    Q = P^T diag(lambda) P,   G' = diag(lambda_1, ..., lambda_r)^(1/2) P[:r]                             server
    U D V^T = svd(G G'^T),   G <- U V^T G':  the one next to the old G of all that have this Gram matrix   server

L, (d_out, k), and R, (k, d_in), are fixed with L^T L = R R^T = I and k = min(d_out, d_in); G is (r, k). Q is never
formed: the singular values and right vectors of the stack of p_k^(1/2) G_k, (K r, k), are lambda^(1/2) and P. The mean
of the Gram matrices is the mean of the products; the cut at rank r is all that is lost.

Ours: L and R are sparse and drawn from a seed (:mod:`fedloom.platform.ties`), since as dense matrices each would be as
large as the weight; G_0 is drawn as LoRA's A, and taken off, since G = 0 has no gradient and any other G would not
start from the base model; clients send G_k and not the k x k matrix G_k^T G_k, which holds no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from fedloom.methods.sending import from_slots
from fedloom.methods.sums import draw_seed, head_means, heads, total_weight, wide, widened
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.received import ties_of
from fedloom.platform.ties import drawn_ties


@dataclass(frozen=True, slots=True, kw_only=True)
class FLoRG:
    """Averages Gram matrices, and the head, by number of examples. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FLoRG",
        paper="arXiv:2602.17095",
        heterogeneous=False,
        global_rank="min",
        exact="up to the cut at rank r",
        down="G, head, the seed of L, R and G_0",
        up="the change of G, head",
        bytes_down="4 (r P_min + H) + 8",
        bytes_up="4 (r P_min + H)",
        server="O(R^2 P_min)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw L, R and G."""
        seed = draw_seed(generator)
        ties = drawn_ties(template.shapes, template.rank, seed)
        silent = {
            module: Factors(B=torch.zeros(d_out, template.rank), A=torch.zeros(template.rank, d_in))
            for module, (d_out, d_in) in template.shapes.items()
        }
        adapter = Adapter(factors=silent, head=dict(template.head), scale=template.scale)
        slots = {f"{module}.G": tie.first for module, tie in ties.items()}
        return State(round=0, seed=seed, adapter=adapter, slots=slots)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send G, the head, and the seed of the rest."""
        rank = len(next(iter(state.slots.values())))
        return replace(from_slots(state, rank, drawn="ties", trained="G"), sends="change")

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the change of G, which is read off A = G R, and of the head."""
        ties = ties_of(dispatch, {m: (len(pair.B), pair.A.shape[1]) for m, pair in trained.factors.items()})
        new = heads(trained.tensors()) | {f"{m}.G": tie.untied(trained.factors[m].A) for m, tie in ties.items()}
        received = dispatch.payload.tensors
        return Payload(tensors={name: wide(tensor) - wide(received[name]) for name, tensor in new.items()})

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k^(1/2) G_k for the stack, and n_k times the head."""
        received = dispatch.payload.tensors
        new = {name: wide(received[name]) + tensor for name, tensor in widened(payload.tensors).items()}
        rows = {name: weight**0.5 * tensor for name, tensor in new.items() if name not in heads(new)}
        return Partial(weight=weight, count=1, sums=heads(new), coefficient=weight, rows=rows)

    def finish(self, state: State, merged: Partial) -> State:
        """Cut the mean Gram matrix of every module to rank r, and turn its root towards the old G."""
        weight = total_weight(merged)
        slots = {name: aligned_root(rows / weight**0.5, state.slots[name]) for name, rows in merged.rows.items()}
        adapter = replace(state.adapter, factors=self._factors(state, slots), head=head_means(merged))
        return replace(state, round=state.round + 1, adapter=adapter, slots=slots)

    def _factors(self, state: State, slots: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Return the plain factors of L (G^T G - G_0^T G_0) R, of rank 2 r."""
        shapes = {module: (len(pair.B), pair.A.shape[1]) for module, pair in state.adapter.factors.items()}
        rank = len(next(iter(slots.values())))
        factors = {}
        for module, tie in drawn_ties(shapes, rank, state.seed).items():
            new, old = tie.pair(slots[f"{module}.G"]), tie.opposite()
            B, A = torch.cat([new.B, old.B.to(new.B)], dim=1), torch.cat([new.A, old.A.to(new.A)])
            factors[module] = Factors(B=B, A=A)
        return factors

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return plain factors, of rank 2 r: those of G and, taken off, those of G_0."""
        return state.adapter, None


def aligned_root(stack: Tensor, old: Tensor) -> Tensor:
    """Return the G of shape (r, k) next to ``old`` whose G^T G is the best approximation of Y^T Y of rank r.

    Args:
        stack: Y, (K r, k).
        old: (r, k).
    """
    _, sigma, P = torch.linalg.svd(stack.double(), full_matrices=False)
    rank = len(old)
    root = sigma[:rank, None] * P[:rank]
    U, _, Vt = torch.linalg.svd(old.double() @ root.T)
    return cast(Tensor, U @ Vt @ root).to(stack)
