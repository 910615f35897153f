"""What a client reads out of a dispatch: the adapter that it trains, and what it wears beside it but does not train."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors, Template, initial_adapter, orthonormal_bases
from fedloom.platform.method import Dispatch, Payload
from fedloom.platform.ties import Tie, drawn_ties

FACTORS = (".A", ".B")  # how the names of factors end


def expanded(payload: Payload) -> dict[str, Tensor]:
    """Return the tensors of a payload in full: zeros stand where a mask of entries leaves something out."""
    masks = payload.masks
    return {
        name: tensor.new_zeros(masks[name].shape).masked_scatter(masks[name], tensor) if name in masks else tensor
        for name, tensor in payload.tensors.items()
    }


def received_adapter(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter that a client starts from, given the (d_out, d_in) of its modules.

    Factors and head that it has in its memory stand where none are sent.
    """
    kept = {
        name: tensor for name, tensor in dispatch.memory.items() if name.startswith("head.") or name[-2:] in FACTORS
    }
    sent, seeds = kept | expanded(dispatch.payload), dispatch.payload.seeds
    if "fresh" not in seeds and "pad" not in seeds:
        return _picked(_between_bases(sent, dispatch, shapes), dispatch.trained)
    template = Template(shapes=shapes, head={}, rank=dispatch.rank, scale=dispatch.scale)
    if "fresh" in seeds:
        drawn = initial_adapter(template, torch.Generator().manual_seed(seeds["fresh"])).cut(dispatch.ranks)
        return Adapter.from_tensors({**drawn.tensors(), **sent}, dispatch.scale)
    received = Adapter.from_tensors(sent, dispatch.scale)
    spare = initial_adapter(template, torch.Generator().manual_seed(seeds["pad"])).cut(dispatch.ranks).factors
    factors = {module: pair.extended(spare[module]) for module, pair in received.factors.items()}
    return Adapter(factors=factors, head=received.head, scale=received.scale)


def ties_of(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tie]:
    """Return the ties between the factors that a client trains, by module; empty where there are none."""
    seed = dispatch.payload.seeds.get("ties")
    return {} if seed is None else drawn_ties(shapes, dispatch.global_rank, seed)


def frozen_factors(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """Return what a client wears but does not train, by module, as plain factors; empty where there is nothing."""
    if ties := ties_of(dispatch, shapes):
        return {module: tie.opposite() for module, tie in ties.items()}
    if not dispatch.trained:
        return {}
    whole = _between_bases(expanded(dispatch.payload), dispatch, shapes)
    others = {
        module: tuple(sorted(set(range(pair.num_blocks)) - set(dispatch.trained[module])))
        for module, pair in whole.factors.items()
    }
    if not any(others.values()):
        return {}
    return {module: pair.folded() for module, pair in _picked(whole, others).factors.items()}


def _between_bases(sent: Mapping[str, Tensor], dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter that was sent: cores between the bases that their seed draws, tied factors as plain ones."""
    if ties := ties_of(dispatch, shapes):
        tied = Adapter(factors={m: tie.pair(sent[f"{m}.G"]) for m, tie in ties.items()}, head={}, scale=dispatch.scale)
        return Adapter.from_tensors({**tied.tensors(), **sent}, dispatch.scale)
    seed = dispatch.payload.seeds.get("bases")
    if seed is None:
        return Adapter.from_tensors(sent, dispatch.scale)
    bases = orthonormal_bases(tuple((name, *shape) for name, shape in shapes.items()), dispatch.global_rank, seed)
    drawn = Adapter(factors=bases, head={}, scale=dispatch.scale).tensors()
    return Adapter.from_tensors({**drawn, **sent}, dispatch.scale)


def _picked(adapter: Adapter, wanted: Mapping[str, Sequence[int]]) -> Adapter:
    """Return the adapter with some of its parts alone, of the modules in ``wanted``."""
    factors = {
        module: pair.blocks(wanted[module]) if module in wanted else pair for module, pair in adapter.factors.items()
    }
    return Adapter(factors=factors, head=adapter.head, scale=adapter.scale)
