"""Local only: every client trains alone, and nothing is sent.

The bound from below that Wang et al., FLoRA, arXiv:2409.05976, and others compare with ("standalone"). Each client goes
on from its own adapter, which is its memory; the first time it draws one of its own rank, with B = 0, from a seed that
it is sent with the head. There is no global model: what is exported is the base model, with which a newcomer starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.methods.sending import fresh
from fedloom.methods.sums import first_state
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOnly:
    """Every client keeps its adapter and its head. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="Local only",
        paper="arXiv:2409.05976",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        memory="its adapter and head",
        personal=True,
        exact="there is none: nothing is averaged",
        down="once: the seed of a fresh adapter, head",
        up="nothing",
        bytes_down="4 H + 8",
        bytes_up="0",
        server="none",
        exceptions={"federation_of_one": "there is no global model: the only client keeps its own"},
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0: the model before anybody has trained."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send a newcomer the head and a seed; the others nothing."""
        first = fresh(state, budget, generator)
        return replace(first, payload=Payload(tensors={})) if client.memory else first

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send nothing."""
        return Payload(tensors={})

    def remember(self, dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
        """Keep everything."""
        return trained.tensors()

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Count the client."""
        return Partial(weight=weight, count=1)

    def finish(self, state: State, merged: Partial) -> State:
        """Count the round."""
        return replace(state, round=state.round + 1)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the model that a newcomer starts from."""
        return state.adapter, None

    def personal(self, state: State, memory: Mapping[str, Tensor]) -> Adapter:
        """Return the client's own adapter, or a newcomer's."""
        return Adapter.from_tensors(memory, state.adapter.scale) if memory else state.adapter
