"""What several methods send: the whole adapter, a prefix, a fresh one or slots down; a part or the change of it up."""

import torch
from torch import Tensor

from fedloom.methods.sums import draw_seed, heads, refuse_larger_rank, shared_by_rank, wide
from fedloom.platform.adapter import Adapter
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State
from fedloom.platform.received import received_adapter


def whole(state: State) -> Dispatch:
    """Send the whole adapter, whatever the budget."""
    rank = max(state.adapter.ranks.values())
    return Dispatch(
        payload=Payload(tensors=state.adapter.tensors()),
        rank=rank,
        global_rank=rank,
        scale=state.adapter.scale,
        shared="adapter",
    )


def prefix(state: State, client: Client, budget: Budget) -> Dispatch:
    """Send the first r_k directions, of every module its own r_k.

    Raises:
        AdapterError: the client asks for more than the server has.
    """
    rank = max(state.adapter.ranks.values())
    refuse_larger_rank(client, budget.largest_rank, rank)
    sent = state.adapter.cut(budget.ranks) if budget.ranks else state.adapter.first(budget.rank)
    return Dispatch(
        payload=Payload(tensors=sent.tensors()),
        rank=budget.largest_rank,
        ranks=budget.ranks,
        global_rank=rank,
        scale=state.adapter.scale,
        shared=shared_by_rank(client, budget),
    )


def fresh(state: State, budget: Budget, generator: torch.Generator) -> Dispatch:
    """Send the head, and the seed of an adapter of the client's own ranks with B = 0; the platform ships the patch."""
    return Dispatch(
        payload=Payload(tensors=heads(state.adapter.tensors()), seeds={"fresh": draw_seed(generator)}),
        rank=budget.largest_rank,
        ranks=budget.ranks,
        global_rank=budget.largest_rank,
        scale=state.adapter.scale,
    )


def from_slots(state: State, rank: int, *, drawn: str, trained: str) -> Dispatch:
    """Send the slots, the head, and the seed of what stands around the slots and stays as it is drawn.

    Args:
        state: the server's.
        rank: r.
        drawn: what the seed draws, as ``Dispatch.payload`` calls it: ``bases`` or ``ties``.
        trained: what is trained beside the head, as ``Dispatch.trainable`` calls it: ``C`` or ``G``.
    """
    return Dispatch(
        payload=Payload(tensors={**state.slots, **heads(state.adapter.tensors())}, seeds={drawn: state.seed}),
        rank=rank,
        global_rank=rank,
        scale=state.adapter.scale,
        trainable=frozenset({trained, "head"}),
        shared="slots",
    )


def trained_part(dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
    """Return the tensors that the dispatch let the client train."""
    return {
        name: tensor
        for name, tensor in trained.tensors().items()
        if ("head" if name.startswith("head.") else name[-1]) in dispatch.trainable
    }


def change(dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
    """Return what was trained less what was downloaded of it."""
    received = received_adapter(dispatch, {}).tensors()
    return {name: wide(new) - wide(received[name]) for name, new in trained.tensors().items()}
