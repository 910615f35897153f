"""Whether PEFT makes of a saved folder the adapter that was meant."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.platform.adapter import Adapter
from fedloom.platform.base_model import quiet_transformers
from fedloom.platform.errors import AdapterError, clipped
from fedloom.platform.peft_layout import (
    CONFIG_NAME,
    PREFIX,
    BaseModel,
    architecture,
    float32_copy,
    scales_agree,
    storable,
)
from fedloom.platform.peft_patterns import check_patterns
from fedloom.platform.peft_read import check_weights, read_config


def verify_adapter(folder: Path, adapter: Adapter, base: BaseModel) -> None:
    """Load a folder through PEFT and compare all that it puts into the model with ``adapter``.

    Tensors are compared bit for bit (with their float32 values), scales up to the rounding of alpha / r in float64.

    The base model costs nothing: it is built from its configuration, and each weight is one zero that stands for all.
    (Weights on PyTorch's device ``meta`` will not do, since PEFT moves an adapter to the device of its base layer, and
    there its values are lost.)

    Before PEFT sees the folder, its files pass :func:`~fedloom.platform.peft_read.load_adapter`'s checks of size, and
    its patterns those of :mod:`~fedloom.platform.peft_patterns`.

    Raises:
        AdapterError: PEFT cannot load the folder, or a module, factor, scale or head tensor differs; names the first.
        ModelError: the base model's configuration cannot be loaded.
    """
    config = read_config(folder)
    check_weights(folder)
    model = architecture(base)
    try:
        check_patterns(config, [name for name, _ in model.named_modules()])
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{clipped(folder / CONFIG_NAME)}: {clipped(error, 500)}") from error
    model = _loaded_by_peft(folder, model)
    layers, found = _lora_layers(model), _head_tensors(model)
    _same_names(folder, "module", layers, adapter.factors)
    _same_names(folder, "head tensor", found, adapter.head)
    for module, factors in adapter.factors.items():
        stored = storable(factors)
        _same_tensor(folder, f"{module}.lora_A", layers[module].lora_A["default"].weight, stored.A)
        _same_tensor(folder, f"{module}.lora_B", layers[module].lora_B["default"].weight, stored.B)
        scale = layers[module].scaling["default"]
        if not scales_agree(scale, adapter.scale):
            raise AdapterError(f"{folder}: PEFT scales {module} by {scale}, but the adapter's scale is {adapter.scale}")
    for name, tensor in adapter.head.items():
        _same_tensor(folder, name, found[name], float32_copy(tensor))


def _loaded_by_peft(folder: Path, model: Any) -> Any:
    """Give a model without weights one zero for each of them, and an adapter."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    hollow = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_weight = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(hollow, requires_grad=False) if is_weight else hollow
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT would warn of, e.g. missing tensors, is compared one by one
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(model, str(folder), torch_device="cpu", low_cpu_mem_usage=True)
        except Exception as error:  # whatever it is, this folder is not one that users can load
            reason = " ".join(str(error).split())[:400]
            raise AdapterError(f"{folder} cannot be loaded by PEFT: {type(error).__name__}: {reason}") from error


def _lora_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix(PREFIX): part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def _head_tensors(model: Any) -> dict[str, Tensor]:
    from peft.utils import ModulesToSaveWrapper

    return {
        f"{name.removeprefix(PREFIX)}.{key}": tensor
        for name, part in model.named_modules()
        if isinstance(part, ModulesToSaveWrapper)
        for key, tensor in part.modules_to_save["default"].state_dict().items()
    }


def _same_names(folder: Path, what: str, found: Collection[str], wanted: Collection[str]) -> None:
    for name in wanted:
        if name not in found:
            raise AdapterError(f"{folder}: PEFT leaves out {what} {name!r} of the adapter")
    for name in found:
        if name not in wanted:
            raise AdapterError(f"{folder}: PEFT also loads {what} {name!r}, which the adapter has not")


def _same_tensor(folder: Path, name: str, found: Tensor, wanted: Tensor) -> None:
    if found.is_meta:
        raise AdapterError(f"{folder}: PEFT finds no {name}")
    found = found.detach()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise AdapterError(
            f"{folder}: {name} is {found.dtype} {tuple(found.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
        )
    unequal = found.contiguous().view(torch.int32) != wanted.view(torch.int32)
    if unequal.any():
        raise AdapterError(f"{folder}: {name} differs in {int(unequal.sum())} of {unequal.numel()} values")
