"""Fed-SB: a small square core between frozen bases is all that is trained, sent and averaged.

Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning, arXiv:2502.15436. Read in an abstract and reviews; the released code was not read, equation numbers and the
weights of the mean are UNCONFIRMED.

    client k trains  C_k  (the paper's R) in  W + s B C_k A,   B and A frozen and common                 client
    C = sum_k p_k C_k,   p_k = n_k / sum_j n_j over the clients of the round                             server

Since the model is linear in the core, the mean of the cores gives the mean of the products, without a cross term:

    sum_k p_k B C_k A = B C A

Shapes: B is (d_out, r), C_k and C are (r, r), A is (r, d_in). The paper takes B and A from a singular value
decomposition of the first step of full fine-tuning, which some data and one gradient of full size have to pay for. Here
they are drawn: orthonormal columns of B and rows of A, the same for everybody from one seed (ours).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom.methods.cores import cored, cored_state, cores_dispatch, cores_payload
from fedloom.methods.sums import head_means, means, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSB:
    """Averages cores and the head by number of examples. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="Fed-SB (drawn bases)",
        paper="arXiv:2502.15436",
        heterogeneous=False,
        global_rank="min",
        aligned=True,
        additive="values",
        exact="yes: B and A are common",
        down="cores, head, the seed of the bases",
        up="cores, head",
        bytes_down="4 (M r r + H) + 8",
        bytes_up="4 (M r r + H)",
        server="O(K M r^2 + r^2 P_B)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw B and A; C = 0."""
        return cored_state(template, generator, 1)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the cores, the head and the seed of the bases."""
        return cores_dispatch(state)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained cores and the head."""
        return cores_payload(trained)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times what was sent."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means."""
        return cored(state, means(merged, state.slots), head_means(merged))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the plain pairs (B C, A)."""
        return state.adapter, None
