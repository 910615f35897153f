"""Zero-padding: clients train prefixes of the server's adapter, and the server averages them padded with zeros.

The plain form of unequal ranks, against which Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models, arXiv:2401.06432, set their method (see :mod:`fedloom.methods.hetlora`). Equation numbers are
UNCONFIRMED.

    client k receives  B[:, :r_k], A[:r_k, :]                                                           server
    B = sum_k p_k pad_r(B_k),  A = sum_k p_k pad_r(A_k),   p_k = n_k / sum_j n_j over the round          values
    B <- B + sum_k p_k pad_r(B_k - B[:, :r_k]),  A likewise                                              change

pad_r appends zero columns (rows) up to the server's rank r. With ``values``, a direction j is multiplied in each factor
by the share of the weight of clients with r_k >= j, even if nobody trains. With ``change`` a round without training
changes nothing, but directions that few hold move by small steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedloom.methods.sending import change, prefix
from fedloom.methods.sums import adapter_of, first_state, means, padded
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroPadding:
    """Averages padded factors, and the head, by number of examples.

    Attributes:
        padding: what is padded and averaged: the trained ``values`` (the published baseline), or their ``change``.
    """

    padding: Literal["values", "change"] = "values"

    traits: ClassVar[Traits] = Traits(
        title="Zero-padding",
        paper="arXiv:2401.06432",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        exact="no: factors are averaged apart",
        down="the first r_k directions, head",
        up="the same, trained",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O(K r P)",
        exceptions={"no_op_round": "a direction that a client does not hold counts as zero (30 % in the law's test)"},
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the first r_k directions."""
        return replace(prefix(state, client, budget), sends=self.padding)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained adapter, or its change."""
        return Payload(tensors=trained.tensors() if self.padding == "values" else change(dispatch, trained))

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times the padded factors and the head."""
        sums = padded(payload.tensors, dispatch.global_rank)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means, or add them."""
        old = state.adapter.tensors()
        new = means(merged, old)
        if self.padding == "change":
            new = {name: tensor + new[name] for name, tensor in old.items()}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter, of rank r."""
        return state.adapter, None
