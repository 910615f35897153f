"""What the methods share: the state before round 0, weighted sums and means of named tensors, and seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors, Patch, Template, initial_adapter
from fedloom.platform.client import Budget, Client
from fedloom.platform.errors import AdapterError, RoundError
from fedloom.platform.method import State
from fedloom.platform.partial import Partial


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed in [0, 2**62)."""
    return int(torch.randint(2**62, (), generator=generator))


def first_state(template: Template, generator: torch.Generator) -> State:
    """Return the state before round 0: A drawn, B = 0. ``state.seed`` redraws the same adapter."""
    seed = draw_seed(generator)
    return State(round=0, seed=seed, adapter=initial_adapter(template, torch.Generator().manual_seed(seed)))


def redrawn(state: State) -> dict[str, Factors]:
    """Return the factors before round 0 once more, drawn from ``state.seed`` in the dtype and on the device of A."""
    factors = state.adapter.factors
    template = Template(
        shapes={module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in factors.items()},
        head={},
        rank=max(state.adapter.ranks.values()),
        scale=state.adapter.scale,
    )
    drawn = initial_adapter(template, torch.Generator().manual_seed(state.seed)).factors
    return {
        module: Factors(B=pair.B.to(factors[module].A), A=pair.A.to(factors[module].A))
        for module, pair in drawn.items()
    }


def wide(tensor: Tensor) -> Tensor:
    """Return float64 as it is and every narrower type as float32, in which sums are taken."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the head under their flat names."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor in the type in which sums are taken, see :func:`wide`."""
    return {name: wide(tensor) for name, tensor in tensors.items()}


def total_weight(merged: Partial) -> float:
    """Return the sum of the weights.

    Raises:
        RoundError: it is not positive.
    """
    if merged.weight <= 0:
        raise RoundError(f"the weights of {merged.count} updates sum to {merged.weight:g}; they must be positive")
    return merged.weight


def means(merged: Partial, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weighted means of the sums called ``names``, over those who took part.

    Raises:
        RoundError: the weights sum to zero.
    """
    weight = total_weight(merged)
    return {name: merged.sums[name] / weight for name in names}


def head_means(merged: Partial) -> dict[str, Tensor]:
    """Return the weighted means of the head's tensors by their names in the head."""
    return {name.removeprefix("head."): mean for name, mean in means(merged, heads(merged.sums)).items()}


def padded(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return tensors in the type of sums, columns of B and rows of A filled with zeros up to ``rank``."""
    sums = {}
    for name, tensor in widened(tensors).items():
        missing = 0 if name.startswith("head.") else rank - tensor.shape[1 if name.endswith(".B") else 0]
        sides = (0, missing) if name.endswith(".B") else (0, 0, 0, missing)
        sums[name] = torch.nn.functional.pad(tensor, sides) if missing else tensor
    return sums


def over_holders(state: State, merged: Partial) -> Adapter:
    """Return the adapter each of whose directions is the mean over those who held it; what nobody held stays.

    The sums have what :func:`holders` gives.
    """
    factors = {}
    for module, old in state.adapter.factors.items():
        held = merged.sums[f"held.{module}"]
        N = torch.where(held > 0, held, 1.0).to(old.A)
        B, A = merged.sums[f"{module}.B"] / N, merged.sums[f"{module}.A"] / N[:, None]
        kept = (held == 0).to(old.A.device)
        factors[module] = Factors(B=torch.where(kept, old.B, B), A=torch.where(kept[:, None], old.A, A))
    return replace(state.adapter, factors=factors, head=head_means(merged))


def holders(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return ``held.<module>``: 1 at each index that a client's factors have and 0 at the others; float64 of (rank,).

    Weighted sums of it are the examples of those who hold an index.
    """
    every = torch.arange(rank)
    return {
        f"held.{name.removesuffix('.A')}": (every < len(tensor)).double()
        for name, tensor in tensors.items()
        if name.endswith(".A") and not name.startswith("head.")
    }


def refilled(state: State, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return new factors filled up to the ranks of the old ones: B = 0 beside rows of A as they were drawn.

    Zero columns of B beside zero rows of A would never get a gradient again. Where nothing is left, A stays.
    """
    old = state.adapter.factors
    new = {module: pair if pair.rank else silenced(old[module]) for module, pair in factors.items()}
    if all(pair.rank == old[module].rank for module, pair in new.items()):
        return new
    spare = redrawn(state)
    return {module: pair.extended(spare[module]) for module, pair in new.items()}


def patched(state: State, piece: Mapping[str, Factors]) -> Patch:
    """Return the patch of the base weights with one more piece."""
    return (state.patch or Patch(scale=state.adapter.scale)).appended(piece)


def silenced(factors: Factors) -> Factors:
    """Return the factors with B = 0: nothing is added to the weights, and A can be trained on."""
    return Factors(B=torch.zeros_like(factors.B), A=factors.A)


def shared_by_rank(client: Client, budget: Budget) -> str:
    """Name a payload that all clients with the same ranks receive; ranks by module belong to a profile."""
    return f"rank-{client.profile}-{client.rank}" if budget.ranks else f"rank-{budget.rank}"


def refuse_larger_rank(client: Client, asked: int, rank: int) -> None:
    """Refuse a client that asks for a rank outside 1 to ``rank``, which the server's adapter cannot serve.

    Raises:
        AdapterError: the rank is out of range.
    """
    if not 1 <= asked <= rank:
        raise AdapterError(
            f"client {client.id!r} of profile {client.profile!r} has rank {asked}, but the global adapter has "
            f"rank {rank} and clients must have 1 to {rank}. Raise adapter.rank or lower the profile's rank."
        )


def adapter_of(tensors: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """Return the adapter with these tensors and the scale of ``like``."""
    return Adapter.from_tensors(tensors, like.scale)
