"""What the server takes from a client: checked against what was asked for, measured, and shortened if that is wanted.

What may come back follows from what was sent out: the update of a client that has trained nothing,
``method.upload(dispatch, received)``, has the names, shapes, types and bytes of every honest one. Whatever differs is
refused before anything is merged, so that a round with a refused update is one in which its client never trained.
"""

import math
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter
from fedloom.platform.experiment import UpdateSection
from fedloom.platform.method import Dispatch, Method, Payload
from fedloom.platform.received import received_adapter

# The norm of a tensor beyond which products of factors, their squares and weighted sums may leave float32: a finite
# update would still make the state infinite. Trained adapters stay far below.
LARGEST_NORM = 1e6

Kind = Literal["late", "out_of_memory", "errors", "size", "module", "shape", "dtype", "not_finite", "norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an update is left out: a kind to count, and the reason in words."""

    kind: Kind
    reason: str


def refusal_of(error: Exception) -> Refusal:
    """Say why the client is left out whose training raised an error: by the user's model, data or method, or memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Refusal(kind="out_of_memory", reason=f"out of memory: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
    return Refusal(kind="errors", reason=f"an error in training: {said}")


def accepted(
    settings: UpdateSection,
    method: Method,
    dispatch: Dispatch,
    payload: Payload,
    *,
    loss: float,
    shapes: Mapping[str, tuple[int, int]],
) -> Payload | Refusal:
    """Return the update as it is merged, shortened if that is wanted, or why it is not.

    Args:
        settings: what is taken from clients.
        method: that of the run.
        dispatch: what the client was sent.
        payload: the update.
        loss: of its training.
        shapes: (d_out, d_in) by target module.
    """
    received = received_adapter(dispatch, shapes)
    expected = method.upload(dispatch, received)
    if method.traits.prunes:
        received, expected = pruned_like(payload, received, expected)
    problem = refusal(payload, expected, loss)
    if problem is not None:
        return problem
    if settings.max_norm is not None:
        norm = norm_of(change_of(dispatch, received, payload))
        if norm > settings.max_norm:
            reason = f"its change has the norm {norm:.4g}, above updates.max_norm {settings.max_norm:g}"
            return Refusal(kind="norm", reason=reason)
    return payload if settings.clip_norm is None else shortened(dispatch, received, payload, settings.clip_norm)


def refusal(payload: Payload, expected: Payload, loss: float) -> Refusal | None:
    """Say why an update must not be merged, or nothing.

    Args:
        payload: the update.
        expected: what a client that has trained nothing would send.
        loss: of its training.
    """
    if payload.num_bytes > expected.num_bytes:
        return Refusal(kind="size", reason=f"{payload.num_bytes} bytes where {expected.num_bytes} were asked for")
    return _misfit(payload, expected) or _loss(loss) or unusable(payload.tensors)


def pruned_like(payload: Payload, received: Adapter, expected: Payload) -> tuple[Adapter, Payload]:
    """Cut what a client received, and what it would send untrained, to the ranks that it has kept: one at least."""
    ranks = {
        module: max(1, min(pair.rank, (*payload.tensors[f"{module}.A"].shape, 0)[0]))
        for module, pair in received.factors.items()
        if f"{module}.A" in payload.tensors
    }
    sent = Adapter.from_tensors(expected.tensors, received.scale).cut(ranks)
    return received.cut(ranks), replace(expected, tensors=sent.tensors())


def _misfit(payload: Payload, expected: Payload) -> Refusal | None:
    """Compare names, then shapes, then types."""
    for found, wanted in ((payload.tensors, expected.tensors), (payload.masks, expected.masks)):
        strangers = sorted(found.keys() ^ wanted.keys())
        if strangers:
            what = "is not there" if strangers[0] in wanted else "was not asked for"
            return Refusal(kind="module", reason=f"tensor {strangers[0]!r} {what}")
        for name, tensor in found.items():
            shape = (int(payload.masks[name].sum()),) if found is payload.tensors and name in payload.masks else None
            if tensor.shape != (shape or wanted[name].shape):
                shapes = f"{tuple(tensor.shape)} where {tuple(wanted[name].shape)} was asked for"
                return Refusal(kind="shape", reason=f"tensor {name!r} is {shapes}")
            if tensor.dtype != wanted[name].dtype:
                types = f"{tensor.dtype} where {wanted[name].dtype} was asked for"
                return Refusal(kind="dtype", reason=f"tensor {name!r} is {types}")
    for module, mask in payload.masks.items():
        if module in payload.tensors:
            continue  # of entries: compared above
        for name, side in ((f"{module}.A", 0), (f"{module}.B", 1)):
            ranks = payload.tensors[name].shape[side] if name in payload.tensors else int(mask.sum())
            if int(mask.sum()) != ranks:
                return Refusal(kind="shape", reason=f"the mask of {module!r} names {int(mask.sum())} ranks of {ranks}")
    return None


def _loss(loss: float) -> Refusal | None:
    return None if math.isfinite(loss) else Refusal(kind="not_finite", reason=f"the training loss is {loss}")


def unusable(tensors: Mapping[str, Tensor]) -> Refusal | None:
    """Look for numbers with which nothing can be computed: NaN, infinity, and what would overflow when merged."""
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    # One pass over all tensors; only where one of the norms is too large, or none, is every term looked at.
    if not floats or (torch.stack(torch._foreach_norm(floats)) <= LARGEST_NORM).all():
        return None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            return Refusal(kind="not_finite", reason=f"tensor {name!r} is not finite")
        norm = float(tensor.double().norm())
        if norm > LARGEST_NORM:
            return Refusal(kind="norm", reason=f"tensor {name!r} has the norm {norm:.4g}, above {LARGEST_NORM:g}")
    return None


def change_of(dispatch: Dispatch, received: Adapter, payload: Payload) -> dict[str, Tensor]:
    """Return by how much an update differs from what its client received, by the payload's names, in float64."""
    if dispatch.sends == "change":
        return {name: tensor.double() for name, tensor in payload.tensors.items()}
    before = _restricted(received, payload.masks)
    return {name: tensor.double() - before[name].double() for name, tensor in payload.tensors.items()}


def norm_of(change: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all tensors."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))


def shortened(dispatch: Dispatch, received: Adapter, payload: Payload, norm: float) -> Payload:
    """Return the update with its change scaled down to ``norm``, if it is longer; else the update as it is."""
    change = change_of(dispatch, received, payload)
    length = norm_of(change)
    if length <= norm:
        return payload
    before = {} if dispatch.sends == "change" else _restricted(received, payload.masks)
    tensors = {}
    for name, delta in change.items():
        scaled = delta * (norm / length)
        whole = scaled if dispatch.sends == "change" else before[name].double() + scaled
        tensors[name] = whole.to(payload.tensors[name].dtype)
    return replace(payload, tensors=tensors)


def _restricted(received: Adapter, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was received under flat names, of masked modules only the ranks that the masks name."""
    flat = received.tensors()
    for module, mask in masks.items():
        flat[f"{module}.B"] = flat[f"{module}.B"][:, mask]
        flat[f"{module}.A"] = flat[f"{module}.A"][mask]
    return flat
