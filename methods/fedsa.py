"""FedSA-LoRA: A is shared and averaged, B stays with its client.

FedSA-LoRA, arXiv:2410.01463 (ICLR 2025); read from the released code's settings and digests, equation numbers
UNCONFIRMED.

    client k trains  (B_k, A)  on from its own B_k, zero at first, and keeps B_k and its head            client
    A = sum_k p_k A_k,   p_k = n_k / sum_j n_j over the clients of the round                             server
    client k's model:  W + s B_k A                                                                       client

B_k and the head never leave the client: they are its memory. There is no global model; what is exported is the base
model with the mean A, B = 0 and the initial head, with which a newcomer starts. Shapes: A_k is (r, d_in), B_k is
(d_out, r).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.methods.sending import whole
from fedloom.methods.sums import adapter_of, first_state, means, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSA:
    """Averages A by number of examples; B and the head are every client's own. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="FedSA-LoRA",
        paper="arXiv:2410.01463",
        heterogeneous=False,
        global_rank="min",
        memory="B and its head",
        personal=True,
        exact="there is none: B is every client's own",
        down="A, and once a seed and the head",
        up="A",
        bytes_down="4 (r P_A + H) + 8",
        bytes_up="4 r P_A",
        server="O(K r P_A)",
        exceptions={"federation_of_one": "there is no global model: the only client keeps its own B"},
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send A; a newcomer also gets the head, and a seed in place of B = 0."""
        own = state.adapter.tensors()
        sent = {name: tensor for name, tensor in own.items() if _shared(name)}
        if client.memory:
            return replace(whole(state), payload=Payload(tensors=sent), shared="A")
        first = sent | {name: tensor for name, tensor in own.items() if name.startswith("head.")}
        payload = Payload(tensors=first, seeds={"fresh": state.seed})
        return replace(whole(state), payload=payload, shared="first")

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send A."""
        return Payload(tensors={name: tensor for name, tensor in trained.tensors().items() if _shared(name)})

    def remember(self, dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
        """Keep B and the head."""
        return {name: tensor for name, tensor in trained.tensors().items() if not _shared(name)}

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return n_k times A."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the mean."""
        new = {**state.adapter.tensors(), **means(merged, merged.sums)}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the model that a newcomer starts from: the base model."""
        return state.adapter, None

    def personal(self, state: State, memory: Mapping[str, Tensor]) -> Adapter:
        """Return the client's B and head over the mean A."""
        return adapter_of({**state.adapter.tensors(), **memory}, state.adapter)


def _shared(name: str) -> bool:
    return name.endswith(".A") and not name.startswith("head.")
