"""Head only: federated averaging of the classifier's head over the frozen base model.

McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv:1602.05629,
applied to the head alone: head <- sum_k w_k head_k with w_k = n_k / sum_j n_j. No adapter is trained. It is the line
that an adapter has to cross before it has learnt anything.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedloom.methods.sums import widened
from fedloom.platform.adapter import Adapter, Patch, Template, initial_adapter
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOnly:
    """Nothing but the head is trained, sent and averaged."""

    traits: ClassVar[Traits] = Traits(
        title="Head only",
        paper="arXiv:1602.05629",
        heterogeneous=True,
        global_rank="min",
        aligned=True,
        additive="values",
        needs_head=True,
        exact="there are none: only the head is trained",
        down="head, a seed",
        up="head",
        bytes_down="4 H + 8",
        bytes_up="4 H",
        server="O(K H)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Return the state before round 0: B = 0, and it stays so."""
        return State(round=0, seed=generator.initial_seed(), adapter=initial_adapter(template, generator))

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the head, and the seed of a rank-1 adapter that stays zero."""
        head = {f"head.{name}": tensor for name, tensor in state.adapter.head.items()}
        return Dispatch(
            payload=Payload(tensors=head, seeds={"fresh": state.seed}),
            rank=1,
            global_rank=max(state.adapter.ranks.values()),
            scale=state.adapter.scale,
            trainable=frozenset({"head"}),
            shared="all",
        )

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained head back."""
        return Payload(tensors={f"head.{name}": tensor for name, tensor in trained.head.items()})

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Weigh the head by the client's examples."""
        return Partial(weight=weight, count=1, sums=widened(payload.tensors), coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Take the weighted mean."""
        head = {name.removeprefix("head."): total / merged.weight for name, total in merged.sums.items()}
        return replace(state, round=state.round + 1, adapter=replace(state.adapter, head=head))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the adapter, whose product is zero, with the trained head."""
        return state.adapter, None
