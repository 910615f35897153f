"""LoRA-A2: rounds take turns at B and A, and each client trains the ranks that matter most to it, over the whole model.

LoRA-A2, arXiv:2410.22815 (ACL 2025). No code was found; known from the paper's text in part, equation numbers and the
weights w_k are UNCONFIRMED.

    a first pass over the client's examples with all r ranks gives dB (or dA) and is thrown away         client
    rounds 1, 3, ... train B:   g_i = ||dB[:, i]|| ||A[i, :]||    rounds 2, 4, ... train A:   ||B[:, i]|| ||dA[i, :]||
    S_k: the r_k M pairs (module, i) of largest g, over all M modules together                           client
    trains B[:, S_k] (or A[S_k, :]) from what it received, over all other ranks, and sends the change    client
    B <- B + sum_k w_k dB_k,   w_k = n_k / sum_j n_j over the clients of the round; A likewise           server

Since the other factor is common, the mean of the changes is the change of the mean product. Shapes: B is (d_out, r),
A is (r, d_in). The paper has learning rates of their own for A and B; here there is one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.methods.sending import whole
from fedloom.methods.sums import adapter_of, first_state, heads, means, refuse_larger_rank, wide, widened
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAA2:
    """Adds the mean change of one factor a round, each client's at ranks of its own choice. It has no options."""

    traits: ClassVar[Traits] = Traits(
        title="LoRA-A2",
        paper="arXiv:2410.22815",
        heterogeneous=True,
        global_rank="max",
        chooses=True,
        exact="yes: one factor is common in each round",
        down="adapter of rank r, head",
        up="the changes of the chosen columns of B or rows of A (S numbers), their masks, head",
        bytes_down="4 (r P + H)",
        bytes_up="4 (S + H) + M ceil(r / 8)",
        server="O(K r P)",
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send both factors, which one is trained, and the share of the ranks that the client may choose."""
        every = whole(state)
        refuse_larger_rank(client, budget.rank, every.rank)
        trainable = frozenset({"A" if state.round % 2 else "B", "head"})
        return replace(every, trainable=trainable, ratio=budget.rank / every.rank, sends="change")

    def choose(self, dispatch: Dispatch, probed: Adapter) -> Dispatch:
        """Take the ranks of largest g over all modules; of equals the first."""
        before = dispatch.payload.tensors
        turn, scores = _turn(dispatch), {}
        for module, pair in probed.factors.items():
            B, A = wide(before[f"{module}.B"]), wide(before[f"{module}.A"])
            B, A = (wide(pair.B) - B, A) if turn == "B" else (B, wide(pair.A) - A)
            scores[module] = torch.linalg.vector_norm(B, dim=0) * torch.linalg.vector_norm(A, dim=1)
        count = max(1, int(dispatch.ratio * dispatch.global_rank + 1e-9)) * len(scores)
        order = torch.cat(list(scores.values())).sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)
        parts = zip(scores, chosen.view(len(scores), -1), strict=True)
        return replace(dispatch, trained={module: tuple(part.nonzero()[:, 0].tolist()) for module, part in parts})

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the change of the factor whose turn it is at the chosen ranks, their masks, and the head's change."""
        before, turn, new = dispatch.payload.tensors, _turn(dispatch), trained.tensors()
        change = {name: wide(tensor) - wide(before[name]) for name, tensor in heads(new).items()}
        masks = {}
        for module, chosen in dispatch.trained.items():
            name, index = f"{module}.{turn}", torch.tensor(chosen, dtype=torch.int64)
            change[name] = wide(new[name]) - wide(before[name]).index_select("AB".index(turn), index)
            masks[module] = torch.zeros(dispatch.global_rank, dtype=torch.bool).index_fill(0, index, True)
        return Payload(tensors=change, masks=masks)

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Put the changes back where they belong, with zeros between."""
        turn, sums = _turn(dispatch), widened(heads(payload.tensors))
        for module, mask in payload.masks.items():
            name = f"{module}.{turn}"
            change: Tensor = wide(payload.tensors[name])
            shape = (len(mask), change.shape[1]) if turn == "A" else (len(change), len(mask))
            index = mask.nonzero()[:, 0]
            sums[name] = change.new_zeros(shape).index_copy("AB".index(turn), index, change)
        return Partial(weight=weight, count=1, sums=sums, coefficient=weight)

    def finish(self, state: State, merged: Partial) -> State:
        """Add the mean changes."""
        old = state.adapter.tensors()
        new = {name: old[name] + change for name, change in means(merged, merged.sums).items()}
        return replace(state, round=state.round + 1, adapter=adapter_of({**old, **new}, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the server's adapter."""
        return state.adapter, None


def _turn(dispatch: Dispatch) -> str:
    """Return which factor is trained in this round."""
    return "A" if "A" in dispatch.trainable else "B"
