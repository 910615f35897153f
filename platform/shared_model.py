"""A base model whose weights many processes of a machine read from one place in memory.

A loaded model is taken apart once: a small recipe, and one numpy array for each storage of its tensors. Ray shares such
arrays between the processes of a node and carries them to each node once. Whoever builds the model from them gets what
was loaded, whatever it consists of: tied weights stay one tensor, and what no checkpoint holds, such as the frequencies
of rotary embeddings, comes along. Nothing of the model's code is run again, and no file is read.

Weights are views of the shared arrays. All other tensors, such as buffers, are copied: a model may write into those.
The recipe is a pickle, as all that Ray carries; it never lies in a file.
"""

import io
import pickle
from collections.abc import Callable
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
class SharedModel:
    """A model at rest between processes.

    Attributes:
        recipe: how to put it together.
        buffers: uint8, the storages of its tensors; read-only where Ray shares them.
    """

    recipe: bytes
    buffers: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def build(self, *, device: str) -> tuple[Any, frozenset[str]]:
        """Return what :func:`~fedloom.platform.base_model.load_base_model` has returned; on the CPU without a copy."""
        with reading_shared_buffers():
            model, missing = pickle.loads(self.recipe, buffers=self.buffers)
        return model.to(device).eval(), missing


def shared_model(model: nn.Module, missing: frozenset[str]) -> SharedModel:
    """Take a model on the CPU apart, without a copy; ``missing`` names what its checkpoint lacks.

    Raises:
        NotShareableError: it writes into its weights, or has parts of which nobody knows that they can be shared.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and part.max_norm is not None:
            raise NotShareableError(f"{name!r} shortens the rows of its weights (max_norm) while it is used")
    buffers: list[pickle.PickleBuffer] = []
    recipe = io.BytesIO()
    try:
        _Pickler(recipe, buffers.append).dump((model, missing))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotShareableError(f"a part of {type(model).__name__} cannot be sent: {error}") from error
    arrays = tuple(np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers)
    return SharedModel(recipe=recipe.getvalue(), buffers=arrays)


class _Pickler(pickle.Pickler):
    """Writes every storage of a tensor once, as an array beside the stream."""

    def __init__(self, stream: io.BytesIO, take: Callable[[pickle.PickleBuffer], Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=take)
        self._storages: dict[int, np.ndarray] = {}

    def reducer_override(self, value: Any) -> Any:
        """Take tensors apart; all else is pickled as ever. Parameters that are one object stay one."""
        if not isinstance(value, Tensor):
            return NotImplemented
        if type(value) not in {Tensor, nn.Parameter} or value.layout != torch.strided or value.device.type != "cpu":
            raise NotShareableError(f"a tensor is a {type(value).__name__} ({value.layout}, on {value.device})")
        view = (self._array(value), value.dtype, value.storage_offset(), tuple(value.shape), value.stride())
        return (_weight, (*view, value.requires_grad)) if isinstance(value, nn.Parameter) else (_private, view)

    def _array(self, tensor: Tensor) -> np.ndarray:
        """Return the bytes of a tensor's storage; the same array for all tensors that lie in it."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = flat.numpy()
        return self._storages[storage.data_ptr()]


def _view(
    array: np.ndarray, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    if array.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(array).view(dtype).as_strided(shape, strides, offset)


def _weight(*view: Any) -> nn.Parameter:
    return nn.Parameter(_view(*view[:-1]), requires_grad=view[-1])


def _private(*view: Any) -> Tensor:
    return _view(*view).clone()
