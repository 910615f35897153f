"""SOFT: near-orthogonal factors, so that norms tell which ranks to leave out of the upload.

Kim and Choi, Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates, arXiv:2505.00333.
RECONSTRUCTED: only the abstracts were at hand. They say that the factors are pushed to near orthogonality, that a
per-rank importance made of norms replaces products and SVDs on the client, and that the two factors are aggregated
separately. The formulas and defaults below are ours, consistent with that.

    client:  loss + (lambda / 2M) sum_l ||off(A A^T)||_F^2 + ||off(B^T B)||_F^2       off(X): X without its diagonal
             g_i = ||B[:, i]|| ||A[i, :]||;   S_k: the max(1, floor(rho_k r)) ranks of largest g in each of M modules
             sends B[:, S_k], A[S_k, :] and a mask of r bits
    server:  means of B and A apart, p_k = n_k / sum_j n_j

If the directions are orthogonal, the g_i are the singular values of B A, and leaving ranks out is the best possible
cut. Separate means differ from the mean product by a covariance, as in FedIT, to which SOFT with rho = 1 and lambda = 0
is equal. The second half of the paper, TSFA, chooses the rho_k for a wireless channel: they come with the budget, see
``methods/tsfa.py``.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.sums import adapter_of, first_state, heads, means, wide, widened
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, Penalty, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class SOFT:
    """Every client trains all ranks and sends the most important ones.

    Attributes:
        orthogonality: lambda, the coefficient of the penalty, shared out evenly among the modules; 0 trains without it.
        keep_ratio: rho of every client; ``None`` leaves it to the budget: its ratio, else its rank over the global one.
        aggregation: what an unsent rank counts as. ``zero_fill``: zeros; a rank that a share f of the weight has sent
            shrinks by f in both factors. ``keep_old``: no change; differences are sent. ``masked_mean``: the mean is
            taken over those who sent it, and the server's rank stays where nobody did. ``error_feedback`` (ours): as
            ``keep_old``, and a client keeps the change of the ranks that it does not send and adds it to its next one.
    """

    orthogonality: Annotated[float, Field(ge=0)] = 1e-2
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    aggregation: Literal["zero_fill", "keep_old", "masked_mean", "error_feedback"] = "zero_fill"

    traits: ClassVar[Traits] = Traits(
        title="SOFT",
        paper="arXiv:2505.00333",
        heterogeneous=True,
        global_rank="max",
        has_ratio=True,
        memory="with error_feedback, the change of the ranks that it has not sent",
        changeable=("orthogonality", "keep_ratio"),
        exact="no: factors are averaged apart",
        down="adapter of rank r, head",
        up="its r_k most important columns and rows, their masks, head",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r_k P + H) + M ceil(r / 8)",
        server="O(K r P)",
        exceptions={
            "no_op_round": "with zero_fill, a rank that a client leaves out counts as zero (32 % in the law's test)"
        },
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the whole adapter, the penalty and the ratio."""
        ranks = state.adapter.ranks
        rank = max(ranks.values())
        penalty = Penalty(name="orthogonality", weight=self.orthogonality / len(ranks))
        return Dispatch(
            payload=Payload(tensors=state.adapter.tensors()),
            rank=rank,
            global_rank=rank,
            scale=state.adapter.scale,
            penalty=penalty if self.orthogonality else None,
            ratio=budget.share(rank) if self.keep_ratio is None else self.keep_ratio,
            sends="change" if self._sends_change else "values",
            shared="adapter",
        )

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the columns of B and rows of A of the kept ranks, their mask, and the head."""
        values, masks = self._chosen(dispatch, trained)
        kept = {
            module: Factors(B=values.factors[module].B[:, mask], A=values.factors[module].A[mask])
            for module, mask in masks.items()
        }
        return Payload(tensors=replace(values, factors=kept).tensors(), masks=masks)

    def remember(self, dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
        """With ``error_feedback``, keep the change with zeros at the ranks that are sent: ``<module>.B.unsent``, .A."""
        if self.aggregation != "error_feedback":
            return {}
        values, masks = self._chosen(dispatch, trained)
        unsent = {}
        for module, sent in masks.items():
            pair = values.factors[module]
            unsent[f"{module}.B.unsent"] = pair.B.masked_fill(sent, 0.0)
            unsent[f"{module}.A.unsent"] = pair.A.masked_fill(sent[:, None], 0.0)
        return unsent

    def _chosen(self, dispatch: Dispatch, trained: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
        """Return what may be sent of all ranks, values or changes, and the masks of those that are."""
        count = max(1, int(dispatch.ratio * dispatch.global_rank + 1e-9))
        memory = dispatch.memory
        due = {
            name: tensor + memory[f"{name}.unsent"].to(tensor) if f"{name}.unsent" in memory else tensor
            for name, tensor in trained.tensors().items()
        }
        whole = Adapter.from_tensors(due, trained.scale)
        masks = {module: most_important(factors, count) for module, factors in whole.factors.items()}
        if not self._sends_change:
            return whole, masks
        return _difference(whole, Adapter.from_tensors(dispatch.payload.tensors, dispatch.scale)), masks

    @property
    def _sends_change(self) -> bool:
        return self.aggregation in ("keep_old", "error_feedback")

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Put the ranks back where they belong, with zeros between."""
        sums = widened(heads(payload.tensors))
        for module, sent in Adapter.from_tensors(payload.tensors, dispatch.scale).factors.items():
            B, A, mask = wide(sent.B), wide(sent.A), payload.masks[module]
            index = mask.nonzero()[:, 0]
            sums[f"{module}.B"] = B.new_zeros(len(B), len(mask)).index_copy(1, index, B)
            sums[f"{module}.A"] = A.new_zeros(len(mask), A.shape[1]).index_copy(0, index, A)
            if self.aggregation == "masked_mean":
                sums[f"{module}.mass"] = mask.to(B)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means, as ``aggregation`` says."""
        old = state.adapter.tensors()
        new = means(merged, old)
        if self._sends_change:
            new = {name: tensor + new[name] for name, tensor in old.items()}
        for module in state.adapter.factors if self.aggregation == "masked_mean" else ():
            B, A = f"{module}.B", f"{module}.A"
            mass = merged.sums[f"{module}.mass"]
            sent = mass > 0
            new[B] = torch.where(sent, merged.sums[B] / mass, old[B])
            new[A] = torch.where(sent[:, None], merged.sums[A] / mass[:, None], old[A])
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter."""
        return state.adapter, None


def most_important(factors: Factors, count: int) -> Tensor:
    """Return the mask, bool of shape (r,), of the ``count`` ranks with the largest ||B[:, i]|| ||A[i, :]||.

    Of equals the first are taken, so that the choice is defined also where B = 0.
    """
    norms = torch.linalg.vector_norm(wide(factors.B), dim=0) * torch.linalg.vector_norm(wide(factors.A), dim=1)
    order = norms.sort(descending=True, stable=True).indices
    return torch.zeros_like(norms, dtype=torch.bool).index_fill(0, order[:count], True)


def _difference(new: Adapter, old: Adapter) -> Adapter:
    before = old.tensors()
    return Adapter.from_tensors({name: wide(t) - wide(before[name]) for name, t in new.tensors().items()}, new.scale)
