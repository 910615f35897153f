"""What methods with frozen bases share: orthonormal B and A drawn from a seed, and the core between them.

A module computes W0 x + s B C A x with C = diag(C_1, ..., C_h), blocks of (r / h, r / h). The state holds the blocks in
its slots, (h, r / h, r / h) by ``<module>.C``, and as its adapter the plain pair (B C, A).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.methods.sending import from_slots
from fedloom.methods.sums import draw_seed, wide
from fedloom.platform.adapter import Adapter, Factors, Template, orthonormal_bases
from fedloom.platform.errors import AdapterError
from fedloom.platform.method import Dispatch, Payload, State


def cored_state(template: Template, generator: torch.Generator, blocks: int) -> State:
    """Return the state before round 0: C = 0 between bases that ``state.seed`` draws.

    Raises:
        AdapterError: the rank is no multiple of the number of blocks, or larger than a module is wide.
    """
    rank, seed = template.rank, draw_seed(generator)
    if rank % blocks:
        raise AdapterError(
            f"adapter.rank {rank} cannot be shared out among {blocks} heads; take a multiple of {blocks}"
        )
    bases = orthonormal_bases(tuple((name, *shape) for name, shape in template.shapes.items()), rank, seed)
    zero = {f"{module}.C": torch.zeros(blocks, rank // blocks, rank // blocks) for module in bases}
    silent = {module: Factors(B=torch.zeros_like(pair.B), A=pair.A) for module, pair in bases.items()}
    adapter = Adapter(factors=silent, head=dict(template.head), scale=template.scale)
    return State(round=0, seed=seed, adapter=adapter, slots=zero)


def cores_dispatch(state: State) -> Dispatch:
    """Send all cores, the head and the seed of the bases; the cores and the head are trained."""
    return from_slots(state, max(state.adapter.ranks.values()), drawn="bases", trained="C")


def cores_payload(trained: Adapter) -> Payload:
    """Send the cores and the head, never the bases."""
    return Payload(tensors={name: t for name, t in trained.tensors().items() if name.endswith(".C") or _of_head(name)})


def cored(state: State, cores: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> State:
    """Return the state after a round that ended with these cores and this head."""
    shapes = tuple((module, len(pair.B), pair.A.shape[1]) for module, pair in state.adapter.factors.items())
    bases = orthonormal_bases(shapes, max(state.adapter.ranks.values()), state.seed)
    factors = {}
    for module, pair in bases.items():
        C = wide(cores[f"{module}.C"])
        factors[module] = Factors(B=pair.B.to(C), A=pair.A.to(C), C=C).folded()
    adapter = replace(state.adapter, factors=factors, head=head)
    return replace(state, round=state.round + 1, adapter=adapter, slots=dict(cores))


def _of_head(name: str) -> bool:
    return name.startswith("head.")
