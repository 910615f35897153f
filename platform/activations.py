"""What training keeps in memory between the forward and the backward pass, counted without running it."""

import contextlib

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec, checkpointing


def activation_bytes(spec: ModelSpec, *, batch_size: int, length: int, checkpointed: bool = False) -> int | None:
    """Count what autograd saves in one forward pass with adapters of rank 1, weights left out.

    The pass runs on fake tensors, which know shapes and kernels and compute nothing, so it takes a moment and no memory
    whatever the model's size is. They are those of the CPU; kernels of a GPU may keep some percent more or less.

    Args:
        spec: the model.
        batch_size: examples of the batch.
        length: tokens of each.
        checkpointed: only the layers' inputs are kept; what one layer saves anew in the backward pass is not counted.

    Returns:
        Bytes; ``None`` where the architecture looks at values in its forward pass, which fake tensors have not.
    """
    host = AdapterHost(spec, device="meta")
    saving = checkpointing(host.model) if checkpointed else contextlib.nullcontext()
    with saving, FakeTensorMode():
        return _saved_bytes(_with_fake_weights(host.model), batch_size, length)


def _saved_bytes(model: nn.Module, batch_size: int, length: int) -> int | None:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}  # held until the end, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in weights:
            saved[address] = tensor
        return tensor

    model.train()
    tokens = torch.zeros(batch_size, length, dtype=torch.long)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Without a mask of the padding: looking at one is what most architectures would do with values.
            logits = model(input_ids=tokens).logits.float()
            labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
            functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    except (RuntimeError, NotImplementedError):
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _with_fake_weights(model: nn.Module) -> nn.Module:
    """Replace the weights of a model on ``meta``, whose attention would take another kernel than a real device's."""
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
    return model
