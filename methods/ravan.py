"""RAVAN: many small heads between frozen bases; weak clients train some of them.

RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, arXiv:2506.05568 (NeurIPS 2025). No code was found;
known from digests, so that equation numbers, defaults and the weights of the mean are UNCONFIRMED.

    W + s sum_{i=1..h} g_i B_i H_i A_i      B_i, A_i frozen and common; H_i = 0 and g_i = 1 at first
    client k trains H_i and g_i of the heads i in J_k over the frozen others, and sends  g_i H_i         client
    C_i = the clients of the round with i in J_k,   N_i = sum_{k in C_i} n_k                             server
    H_i <- sum_{k in C_i} (n_k / N_i) g_i,k H_i,k;  where C_i is empty H_i stays;  g_i <- 1              server

The gain (the paper's s_i) is multiplied into its head once, on the client. The bases are common, so that the mean of
the heads gives the mean of the products. Shapes: with q = r / h, B_i is (d_out, q), H_i is (q, q), A_i is (q, d_in);
all B_i side by side have orthonormal columns, all A_i on top of each other orthonormal rows. Here r is the rank of all
heads together. A client of rank r_k trains floor(r_k / q) of them in each module, at least one: drawn, or those of the
largest norm. The paper's third choice, by gradients, is not offered.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.cores import cored, cored_state, cores_dispatch, cores_payload
from fedloom.methods.sums import draw_seed, head_means, heads, refuse_larger_rank, wide
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.seeds import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class RAVAN:
    """Averages every head over those who trained it, by number of examples.

    Attributes:
        heads: h; the server's rank must be a multiple of it. The default is ours.
        choice: which heads a client of a smaller rank trains in each module: ``random`` draws them anew in every round,
            ``weight`` takes those of the largest norm ||H_i||_F.
    """

    heads: Annotated[int, Field(ge=1)] = 4
    choice: Literal["random", "weight"] = "random"

    traits: ClassVar[Traits] = Traits(
        title="RAVAN",
        paper="arXiv:2506.05568",
        heterogeneous=True,
        global_rank="max",
        exact="yes, of each head over those who trained it: bases are common",
        down="all heads (4), the head of the classifier, the seeds of bases and choice",
        up="the trained heads, the head of the classifier",
        bytes_down="4 (M r r / 4 + H) + 16",
        bytes_up="4 (M max(1, floor(4 r_k / r)) r / 4 r / 4 + H)",
        server="O(K M r^2 / h + r^2 P_B / h)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw the bases; H = 0."""
        return cored_state(template, generator, self.heads)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send all heads, and say which of them are trained."""
        every = cores_dispatch(state)
        refuse_larger_rank(client, budget.rank, every.rank)
        count, seed = max(1, budget.rank * self.heads // every.rank), draw_seed(generator)
        chosen = {
            module: self.chosen(state.slots[f"{module}.C"], seed, module, count) for module in state.adapter.factors
        }
        drawn = self.choice == "random"
        return replace(
            every,
            payload=replace(every.payload, seeds={**every.payload.seeds, "heads": seed}) if drawn else every.payload,
            rank=count * (every.rank // self.heads),
            trainable=every.trainable | {"gain"},
            trained=chosen,
            shared=None if drawn else every.shared,
        )

    def chosen(self, H: Tensor, seed: int, module: str, count: int) -> tuple[int, ...]:
        """Return J of one module, ascending. Of equal norms the first are taken."""
        if self.choice == "random":
            order = torch.randperm(len(H), generator=generator_for("heads", seed, module))
        else:
            order = torch.linalg.vector_norm(wide(H), dim=(1, 2)).sort(descending=True, stable=True).indices
        return tuple(sorted(order[:count].tolist()))

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained heads, gains multiplied in, and the head of the classifier."""
        return cores_payload(trained)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times the heads, each at its place, and what says who trained which."""
        sums = heads(payload.tensors)
        for module, index in dispatch.trained.items():
            H, places = wide(payload.tensors[f"{module}.C"]), torch.tensor(index)
            sums[f"{module}.C"] = H.new_zeros(self.heads, *H.shape[1:]).index_copy(0, places.to(H.device), H)
            sums[f"held.{module}"] = torch.zeros(self.heads, dtype=torch.float64).index_fill(0, places, 1.0)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the mean of every head over those who trained it."""
        cores = {}
        for name, old in state.slots.items():
            held = merged.sums[f"held.{name.removesuffix('.C')}"].to(old.device)[:, None, None]
            mean = merged.sums[name] / torch.where(held > 0, held, 1.0).to(merged.sums[name])
            cores[name] = torch.where(held > 0, mean, old.to(mean))
        return cored(state, cores, head_means(merged))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the plain pairs (B diag(H_1, ..., H_h), A)."""
        return state.adapter, None
