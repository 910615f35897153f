"""FLoRIST: the singular values of the stacked adapters, cut where a share tau of their energy is reached.

Ramesh and Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models, arXiv:2506.09199, section 3 and algorithm 1 of its first version (flow ``merge``). The second flow is
that of the authors' later code; the text of the later version was not at hand.

    B_stack = [B_1 ... B_K],  A_stack = [w_1 A_1; ...; w_K A_K],  w_k = n_k / sum_j n_j          per module, server
    B_stack A_stack = U diag(sigma) V^T
    p = the smallest with sum_{i<=p} sigma_i^2 >= tau sum_i sigma_i^2                            squared, per module
    B_g = U[:, :p] diag(sigma[:p]),  A_g = V[:, :p]^T                                            a cut: kept values stay

The paper reaches the singular values by two thin SVDs and a core; :mod:`fedloom.methods.algebra` gets the same values
cheaper. Then

    merge      W <- W + s B_g A_g for everybody, and every round starts from a fresh adapter of the client's own rank
    continue   W stays; (B_g, A_g), cut or padded to r_k, is what the client trains on
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.algebra import energy_rank, lift_product, mean_product
from fedloom.methods.sending import fresh
from fedloom.methods.sums import first_state, head_means, shared_by_rank, silenced
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.seeds import seed_for


@dataclass(frozen=True, slots=True, kw_only=True)
class FLoRIST:
    """One global pair of factors per module, of the rank that its spectrum asks for.

    Attributes:
        tau: share of the energy (the sum of squared singular values) that is kept; 1 keeps all and is plain stacking.
        max_rank: the most directions that are kept of a module, whatever its energy; ``None``, as in the paper, sets no
            bound (ours).
        flow: ``merge`` adds each round's pair to the base weights (first version of the paper); ``continue`` trains on
            it (the authors' later code).
        padding: of a pair with fewer directions than the client trains, in the flow ``continue``: ``fresh`` draws rows
            of A; ``zero`` is the later code's, whose added ranks never get a gradient and so are not even sent.
    """

    tau: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_rank: Annotated[int, Field(ge=1)] | None = None
    flow: Literal["merge", "continue"] = "merge"
    padding: Literal["fresh", "zero"] = "fresh"

    traits: ClassVar[Traits] = Traits(
        title="FLoRIST",
        paper="arXiv:2506.09199",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        changeable=("tau", "max_rank"),
        exact="up to the share of energy that tau cuts",
        down="the seed of a fresh adapter, head, missed pieces of the patch",
        up="adapter of rank r_k, head",
        bytes_down="4 H + 8",
        bytes_up="4 (r_k P + H)",
        patch="as tau asks",
        server="O(R^2 P + M R^3)",
        exceptions={"federation_of_one": "tau < 1 cuts the spectrum of a single client too"},
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """``merge``: an empty patch and an adapter of rank 0; ``continue``: A drawn, B = 0."""
        state = first_state(template, generator)
        if self.flow == "continue":
            return state
        return replace(state, adapter=state.adapter.first(0), patch=Patch(scale=template.scale))

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """``merge``: the head and a seed; the platform ships the patch. ``continue``: up to r_k directions."""
        if self.flow == "merge":
            return fresh(state, budget, generator)
        sent = state.adapter.cut(budget.ranks) if budget.ranks else state.adapter.first(budget.rank)
        rank = budget.largest_rank
        if self.padding == "fresh" and any(has < budget.ranks.get(m, rank) for m, has in sent.ranks.items()):
            payload = Payload(tensors=sent.tensors(), seeds={"pad": seed_for(state.seed, "pad", state.round)})
        else:
            payload = Payload(tensors=sent.tensors())
        return Dispatch(
            payload=payload,
            rank=rank,
            ranks=budget.ranks,
            global_rank=rank,
            scale=sent.scale,
            shared=shared_by_rank(client, budget),
        )

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the whole trained adapter."""
        return Payload(tensors=trained.tensors())

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the factors for the stack, n_k on the side of A, and n_k times the head."""
        return lift_product(payload, weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Cut the spectrum of every module; append the pair to the patch, or keep it to continue from."""
        pairs = {module: mean_product(merged, module, self._keep) for module in state.adapter.factors}
        adapter = replace(state.adapter, head=head_means(merged))
        if state.patch is not None:
            return replace(state, round=state.round + 1, adapter=adapter, patch=state.patch.appended(pairs))
        factors = {module: new if new.rank else silenced(adapter.factors[module]) for module, new in pairs.items()}
        return replace(state, round=state.round + 1, adapter=replace(adapter, factors=factors))

    def _keep(self, sigma: Tensor) -> int:
        asked = energy_rank(sigma, self.tau)
        return asked if self.max_rank is None else min(asked, self.max_rank)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """``merge``: an adapter of rank 0 over the patch; ``continue``: the global pair."""
        return state.adapter, state.patch
