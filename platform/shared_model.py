"""A base model whose weights many processes of a machine read from one place in memory.

A loaded model is taken apart once: the model itself with empty weights, and one numpy array for each storage in which
its weights lie. Ray shares such arrays between the processes of a node and carries them to each node once. Whoever puts
the two together has what was loaded, whatever it consists of: tied weights are one parameter as they were, and what no
checkpoint holds, such as the frequencies of rotary embeddings, comes along. No file is read again.

Weights are views of the shared arrays. All other tensors, such as buffers, are copies: a model may write into those.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.platform.errors import FedloomError
from fedloom.platform.wire import reading_shared_buffers


class NotShareableError(FedloomError):
    """A model that has to be loaded by every process for itself; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where a weight lies: the number of its array, then its offset and strides in elements."""

    array: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, arrays: tuple[np.ndarray, ...]) -> Tensor:
        """Return the weight, without a copy."""
        array = arrays[self.array]
        if array.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_numpy(array).view(self.dtype).as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """A model at rest between processes.

    Attributes:
        skeleton: the model with empty weights.
        missing: names of the weights that its checkpoint lacks.
        views: where each weight lies, in the order of the skeleton's parameters, tied ones once.
        arrays: uint8, the storages of the weights; read-only where Ray shares them.
    """

    skeleton: Any
    missing: frozenset[str]
    views: tuple[View, ...]
    arrays: tuple[np.ndarray, ...]

    def build(self, *, device: str) -> tuple[Any, frozenset[str]]:
        """Return what :func:`~fedloom.platform.base_model.load_base_model` has returned; on the CPU without a copy."""
        model = copy.deepcopy(self.skeleton)
        with reading_shared_buffers():
            for parameter, view in zip(model.parameters(), self.views, strict=True):
                parameter.data = view.of(self.arrays)  # in place: whoever else refers to the parameter has it too
        return model.to(device).eval(), self.missing


def shared_model(model: nn.Module, missing: frozenset[str]) -> SharedModel:
    """Take a model on the CPU apart, without a copy of its weights; ``missing`` names what its checkpoint lacks.

    Raises:
        NotShareableError: it writes into its weights, or has parts of which nobody knows that they can be shared.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and part.max_norm is not None:
            raise NotShareableError(f"{name!r} shortens the rows of its weights (max_norm) while it is used")
    for name, weight in model.named_parameters():
        if type(weight) is not nn.Parameter or weight.layout != torch.strided or weight.device.type != "cpu":
            raise NotShareableError(f"{name!r} is a {type(weight).__name__} ({weight.layout}, on {weight.device})")
    numbers: dict[int, int] = {}  # of the arrays, by the address of the storage
    arrays: list[np.ndarray] = []
    views = []
    for weight in model.parameters():
        storage = weight.untyped_storage()
        if storage.data_ptr() not in numbers:
            numbers[storage.data_ptr()] = len(arrays)
            arrays.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        views.append(
            View(
                array=numbers[storage.data_ptr()],
                dtype=weight.dtype,
                offset=int(weight.storage_offset()),
                shape=tuple(weight.shape),
                strides=weight.stride(),
            )
        )
    return SharedModel(skeleton=_skeleton(model), missing=missing, views=tuple(views), arrays=tuple(arrays))


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy a model, with an empty parameter in the place of each weight."""
    empty = {
        id(weight): nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    try:
        return copy.deepcopy(model, dict(empty))
    except (TypeError, RuntimeError) as error:
        raise NotShareableError(f"a part of {type(model).__name__} cannot be copied: {error}") from error
