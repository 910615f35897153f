"""What saving, loading and checking an adapter in PEFT's format have in common."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedloom.platform.adapter import Factors
from fedloom.platform.base_model import ModelSpec, load_base_model

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper around the base model, in every tensor's name


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The base model that an adapter belongs to.

    Attributes:
        name: what the user calls it, e.g. ``builtin:tiny``.
        path: what ``from_pretrained`` is given; written into the folder.
        revision: branch, tag or commit of a hub model.
        task: the family of the model.
        num_labels: the number of classes of a classifier.
        label_names: their names, if they have any.
        head_modules: the modules that are stored in full, e.g. ``("score",)`` (PEFT: ``modules_to_save``).
    """

    name: str
    path: str
    revision: str | None
    task: Literal["classification", "causal_lm"]
    num_labels: int | None
    label_names: tuple[str, ...]
    head_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an adapter's folder says of the model that it belongs to, as PEFT words it.

    Attributes:
        task_type: e.g. ``CAUSAL_LM``.
        base_model: what ``from_pretrained`` is given for the base model.
        revision: branch, tag or commit of it.
        head_modules: the modules that are stored in full, in ``modules_to_save``.
        fan_in_fan_out: whether the weights that are adapted are stored as (d_in, d_out).
    """

    task_type: str | None
    base_model: str | None
    revision: str | None
    head_modules: tuple[str, ...]
    fan_in_fan_out: bool = False


def architecture(base: BaseModel) -> Any:
    """Build the base model without weights, on the device ``meta``."""
    numbered = tuple(str(index) for index in range(base.num_labels or 0))
    spec = ModelSpec(
        path=base.path,
        revision=base.revision,
        dtype="float32",
        task=base.task,
        label_names=base.label_names or numbered,
        pad_token_id=0,
        targets=None,
        dropout=0.0,
    )
    return load_base_model(spec, device="meta")[0]


def storable(factors: Factors) -> Factors:
    """Return what stands in the file for a module's factors: float32 copies; rank 0 as rank 1 of zeros."""
    if factors.rank == 0:
        return Factors(B=torch.zeros(factors.B.shape[0], 1), A=torch.zeros(1, factors.A.shape[1]))
    return Factors(B=float32_copy(factors.B), A=float32_copy(factors.A))


def float32_copy(tensor: Tensor) -> Tensor:
    """Return a copy that shares nothing, as safetensors asks."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def scales_agree(one: float, other: float) -> bool:
    """Whether two quotients alpha / r mean the same scale."""
    return math.isclose(one, other, rel_tol=1e-12)  # a few roundings of float64; float32 sees no difference
