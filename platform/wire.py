"""How tensors cross process borders: one flat buffer and a small header, never torch objects.

Ray shares numpy buffers between processes without a copy; torch tensors cost five to ten times as much, and pickled
tensors would run code on load.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.method import Dispatch, Payload, Penalty
from fedloom.platform.partial import Partial

ALIGNMENT_BYTES = 64  # a cache line: tensors start where vector loads like them
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """Tensors at rest between processes.

    Attributes:
        layout: name, dtype, shape and byte offset of each tensor.
        meta: JSON values beside them.
        buffer: uint8, all tensors one after the other.
    """

    layout: tuple[tuple[str, str, tuple[int, ...], int], ...]
    meta: Mapping[str, Any]
    buffer: np.ndarray


def pack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Packet:
    """Copy tensors into one buffer, in their order."""
    layout = []
    end = 0
    for name, tensor in tensors.items():
        layout.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        size = tensor.numel() * tensor.element_size()
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    buffer = np.empty(end, dtype=np.uint8)
    packet = Packet(layout=tuple(layout), meta=dict(meta or {}), buffer=buffer)
    for (_, view), tensor in zip(_views(packet), tensors.values(), strict=True):
        view.copy_(tensor.detach())
    return packet


def unpack(packet: Packet) -> dict[str, Tensor]:
    """Return the tensors as views of the buffer, which may be shared and read-only: never write into them."""
    return dict(_views(packet))


@contextlib.contextmanager
def reading_shared_buffers() -> Iterator[None]:
    """Let tensors be views of shared buffers: those are read-only, and torch, which cannot say so, would warn.

    By contract nobody writes into such a view.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given .* is not writable", category=UserWarning)
        yield


def _views(packet: Packet) -> Iterator[tuple[str, Tensor]]:
    with reading_shared_buffers():
        for name, dtype, shape, start in packet.layout:
            if dtype not in DTYPES:
                raise AdapterError(f"tensor {name!r} has dtype {dtype}; allowed: {', '.join(sorted(DTYPES))}")
            kind, count = DTYPES[dtype], math.prod(shape)
            if not _fits(shape, start, count * kind.itemsize, packet.buffer.nbytes):
                raise AdapterError(
                    f"tensor {name!r} of shape {tuple(shape)} at byte {start} does not lie in a buffer of "
                    f"{packet.buffer.nbytes} bytes"
                )
            if count == 0:
                yield name, torch.empty(shape, dtype=kind)
            else:
                yield name, torch.frombuffer(packet.buffer, dtype=kind, count=count, offset=start).view(shape)


def _fits(shape: tuple[int, ...], start: int, size: int, end: int) -> bool:
    """Whether a tensor lies in a buffer of ``end`` bytes, and torch can count its strides, also where it is empty."""
    countable = min((0, *shape)) == 0 and math.prod(max(1, length) for length in shape) < 2**62
    return countable and 0 <= start <= start + size <= end


def pack_payload(payload: Payload) -> Packet:
    """Pack what is downloaded or uploaded."""
    tensors = {f"t/{name}": tensor for name, tensor in payload.tensors.items()}
    masks = {f"m/{name}": mask for name, mask in payload.masks.items()}
    return pack(tensors | masks, {"seeds": dict(payload.seeds)})


def unpack_payload(packet: Packet) -> Payload:
    """Undo :func:`pack_payload`, without a copy."""
    flat = unpack(packet)
    return Payload(
        tensors={name[2:]: tensor for name, tensor in flat.items() if name.startswith("t/")},
        masks={name[2:]: tensor for name, tensor in flat.items() if name.startswith("m/")},
        seeds=packet.meta["seeds"],
    )


def dispatch_header(dispatch: Dispatch) -> dict[str, Any]:
    """Return all of a dispatch but its payload, as JSON values."""
    penalty = dispatch.penalty
    return {
        "rank": dispatch.rank,
        "ranks": dict(dispatch.ranks),
        "global_rank": dispatch.global_rank,
        "scale": dispatch.scale,
        "trainable": sorted(dispatch.trainable),
        "penalty": None if penalty is None else asdict(penalty),
        "ratio": dispatch.ratio,
        "sends": dispatch.sends,
        "trained": {module: list(ranks) for module, ranks in dispatch.trained.items()},
        "round": dispatch.round,
    }


def dispatch_from(header: Mapping[str, Any], payload: Payload) -> Dispatch:
    """Put a header of :func:`dispatch_header` and its payload together again."""
    fields = dict(header)
    penalty = fields.pop("penalty")
    return Dispatch(
        payload=payload,
        trainable=frozenset(fields.pop("trainable")),
        trained={module: tuple(ranks) for module, ranks in fields.pop("trained").items()},
        penalty=None if penalty is None else Penalty(**penalty),
        **fields,
    )


def pack_partial(partial: Partial, memories: Mapping[str, Mapping[str, Tensor]] | None = None, **origin: Any) -> Packet:
    """Pack a partial for the server, and what its clients keep; ``origin`` says, in JSON values, what it belongs to."""
    sums = {f"s/{name}": tensor for name, tensor in partial.sums.items()}
    rows = {f"r/{name}": tensor for name, tensor in partial.rows.items()}
    stacks = {f"k/{name}": tensor for name, tensor in _factor_tensors(partial.stacks).items()}
    kept, meta = memory_tensors(memories or {})
    meta |= {"weight": partial.weight, "count": partial.count, "coefficient": partial.coefficient, **origin}
    return pack(sums | rows | stacks | kept, meta)


def unpack_partial(packet: Packet) -> Partial:
    """Undo :func:`pack_partial`, without a copy."""
    flat = unpack(packet)
    stacks = Adapter.from_tensors({name[2:]: tensor for name, tensor in flat.items() if name.startswith("k/")}, 1.0)
    return Partial(
        weight=packet.meta["weight"],
        count=packet.meta["count"],
        coefficient=packet.meta["coefficient"],
        sums={name[2:]: tensor for name, tensor in flat.items() if name.startswith("s/")},
        stacks=stacks.factors,
        rows={name[2:]: tensor for name, tensor in flat.items() if name.startswith("r/")},
    )


def memory_tensors(memories: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return memories by client under flat names, and the JSON value by which :func:`memories_in` reads them."""
    flat = {
        f"memory/{index}/{name}": tensor
        for index, memory in enumerate(memories.values())
        for name, tensor in memory.items()
    }
    return flat, {"memories": list(memories)}


def memories_in(packet: Packet) -> dict[str, dict[str, Tensor]]:
    """Return the memories by client that a packet of :func:`memory_tensors` holds, without a copy."""
    memories: dict[str, dict[str, Tensor]] = {client: {} for client in packet.meta.get("memories", ())}
    clients = list(memories)
    for name, tensor in unpack(packet).items():
        kind, _, rest = name.partition("/")
        if kind == "memory":
            index, _, own = rest.partition("/")
            memories[clients[int(index)]][own] = tensor
    return memories


def pack_adapter(adapter: Adapter) -> Packet:
    """Pack a whole adapter."""
    return pack(adapter.tensors(), {"scale": adapter.scale})


def unpack_adapter(packet: Packet) -> Adapter:
    """Undo :func:`pack_adapter`, without a copy."""
    return Adapter.from_tensors(unpack(packet), packet.meta["scale"])


def pack_factors(factors: Mapping[str, Factors]) -> Packet:
    """Pack factors by module, e.g. a piece of a patch."""
    return pack(_factor_tensors(factors))


def unpack_factors(packet: Packet) -> dict[str, Factors]:
    """Undo :func:`pack_factors`, without a copy."""
    return dict(Adapter.from_tensors(unpack(packet), 1.0).factors)


def _factor_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return Adapter(factors=factors, head={}, scale=1.0).tensors()
