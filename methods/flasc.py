"""FLASC: dense local training between sparse messages, and AdamW on the server.

Kuo et al., Federated LoRA with Sparse Communication, arXiv:2406.05233; read from the released code, equation numbers
UNCONFIRMED. theta: every B, A and tensor of the head; top_q: the share q of all entries with the largest magnitude.

    client k receives  theta' = top_q(theta)                   over all tensors jointly                  server
    trains every entry from theta' and sends  top_q_k(theta_k - theta')                                  client
    D = (1/K) sum_k of what was sent, zeros elsewhere;  one AdamW step on the gradient -D                server

The mean is uniform and divided by all K, not by how many sent an entry. Entries travel with a mask of one bit each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.sending import whole
from fedloom.methods.server_step import adamw
from fedloom.methods.sums import adapter_of, first_state, means, wide, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.received import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class FLASC:
    """Every client trains all entries; the largest go down and up.

    Attributes:
        density_down: q, the share of the entries that go down.
        density_up: q_k of every client; ``None`` takes the client's rank over the global one.
        server_lr: eta of the server's AdamW.
        beta1: decay of its first moment.
        beta2: decay of its second moment.
        weight_decay: its decoupled weight decay; torch's default is 0.01.
    """

    density_down: Annotated[float, Field(gt=0, le=1)] = 1.0
    density_up: Annotated[float, Field(gt=0, le=1)] | None = None
    server_lr: Annotated[float, Field(gt=0)] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    traits: ClassVar[Traits] = Traits(
        title="FLASC",
        paper="arXiv:2406.05233",
        heterogeneous=True,
        global_rank="max",
        exact="no: factors are averaged apart",
        down="adapter of rank r, head (or the largest entries and their mask)",
        up="the largest r_k / r of the entries of the change, a mask",
        bytes_down="4 (r P + H)",
        bytes_up="4 floor(r_k / r (r P + H)) + ceil((r P + H) / 8)",
        server="O(K r P)",
        exceptions={
            "federation_of_one": "the server takes an AdamW step of its own length along the client's change",
            "split_client": "the mean is uniform over clients, so a client split in two counts twice",
            "no_op_round": "the moments of earlier rounds move the model on (67 % in the law's test)",
        },
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the largest entries of the adapter and the head."""
        dense = whole(state)
        ratio = min(1.0, budget.rank / dense.global_rank) if self.density_up is None else self.density_up
        return replace(dense, payload=sparse(dense.payload.tensors, self.density_down), ratio=ratio, sends="change")

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the largest entries of the change since the download."""
        received = expanded(dispatch.payload)
        change = {name: wide(new) - wide(received[name]) for name, new in trained.tensors().items()}
        return sparse(change, dispatch.ratio)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return the change with zeros where nothing was sent; every participant weighs 1."""
        return Partial(weight=1.0, count=1, sums=widened(expanded(payload)))

    def finish(self, state: State, merged: Partial) -> State:
        """Take an AdamW step along the mean change."""
        change = means(merged, state.adapter.tensors())
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        new, slots = adamw(state, change, rate=self.server_lr, **betas, weight_decay=self.weight_decay)
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter), slots=slots)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the server's dense adapter."""
        return state.adapter, None


def sparse(tensors: Mapping[str, Tensor], density: float) -> Payload:
    """Return a payload of the largest ``floor(density * n)`` of all n entries, at least one, with masks.

    Of equals the first are taken. At density 1 everything is sent, without masks.
    """
    if density >= 1:
        return Payload(tensors=tensors)
    sizes = torch.cat([tensor.abs().flatten() for tensor in tensors.values()])
    count = max(1, int(density * len(sizes) + 1e-9))
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[sizes.sort(descending=True, stable=True).indices[:count]] = True
    parts = torch.split(chosen, [tensor.numel() for tensor in tensors.values()])
    masks = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    return Payload(tensors={name: tensors[name][mask] for name, mask in masks.items()}, masks=masks)
