"""FedIT: federated averaging of the factors of one common rank.

Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, arXiv:2305.05644. Equation numbers
are UNCONFIRMED; the weights p_k follow the released code.

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients of the round        server

The mean is taken over factors, so the server's product is not the mean of the clients' products. The difference is
a covariance, zero when all A_k (or all B_k) agree:

    sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B) (A_k - A)

Every client trains the whole adapter, whatever its budget: the method knows one rank.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.sending import trained_part, whole
from fedloom.methods.sums import adapter_of, first_state, means, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedIT:
    """Averages the factors and the head by number of examples. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FedIT",
        paper="arXiv:2305.05644",
        heterogeneous=False,
        global_rank="min",
        aligned=True,
        additive="values",
        exact="no: factors are averaged apart",
        down="adapter of rank r, head",
        up="the same, trained",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the whole adapter."""
        return whole(state)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send what was trained: here the whole adapter."""
        return Payload(tensors=trained_part(dispatch, trained))

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times what was sent."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means; what was not trained stays."""
        new = {**state.adapter.tensors(), **means(merged, merged.sums)}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter."""
        return state.adapter, None
