"""Adapters at rest, in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, never a pickle.

PEFT multiplies a module's product by ``alpha / r``. Here the scale s belongs to the adapter, so every module of rank r
gets ``alpha = s * r``: as the folder's default for the largest rank, as ``rank_pattern`` and ``alpha_pattern`` for the
others. PEFT has no rank 0; such a module is stored as rank 1 with both factors zero.

In float64 ``alpha / r`` may miss s by one unit in the last place, which float32 arithmetic cannot see. So s itself
stands in the header of the safetensors file, beside the class names; PEFT ignores both.
"""

import contextlib
import json
import math
import re
import shutil
import uuid
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.base_model import ModelSpec, load_base_model, quiet_transformers
from fedloom.platform.errors import AdapterError, nearest

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper around the base model, in every tensor's name
ADAPTER_FILES = {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters")


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


def save_adapter(folder: Path, adapter: Adapter, base: BaseModel) -> Path:
    """Write an adapter in float32 as a folder that ``PeftModel.from_pretrained`` loads, and return the folder.

    It is written beside and renamed into place. An earlier adapter of the same name is replaced.

    Raises:
        AdapterError: the adapter does not fit the base model, or the folder holds something else than an adapter.
        ModelError: the base model's configuration cannot be loaded.
    """
    _check_fit(adapter, base)
    _check_replaceable(folder)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        (beside / WEIGHTS_NAME).write_bytes(_safetensors(adapter, base.label_names))
        text = json.dumps(_config_of(adapter, base), indent=2, sort_keys=True)
        (beside / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter that :func:`save_adapter` or PEFT wrote: the same values, in float32.

    Raises:
        AdapterError: it is no such folder, an adapter of another kind, or its modules have different scales.
    """
    config = _read_config(folder)
    tensors, notes = _read_tensors(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor:
            pairs.setdefault(factor[1], {})[factor[2]] = tensor.float()
        elif name == key or "lora_" in name:
            raise AdapterError(f"{folder / WEIGHTS_NAME}: tensor {key!r} belongs to no plain LoRA layer of PEFT")
        else:
            head[name] = tensor.float()
    alone = sorted(module for module, pair in pairs.items() if len(pair) == 1)
    if alone or not pairs:
        what = f"module {alone[0]!r} has one factor without the other" if alone else "there are no LoRA factors"
        raise AdapterError(f"{folder / WEIGHTS_NAME}: {what}")
    factors = {module: Factors(B=pair["B"], A=pair["A"]) for module, pair in pairs.items()}
    return Adapter(factors=factors, head=head, scale=_scale_of(folder, config, factors, notes.get("scale")))


def verify_adapter(folder: Path, adapter: Adapter, base: BaseModel) -> None:
    """Load a folder through PEFT and compare all that it puts into the model with ``adapter``, bit for bit.

    The base model costs nothing: it is built from its configuration, and each weight is one zero that stands for all.
    (Weights on PyTorch's device ``meta`` will not do, since PEFT moves an adapter to the device of its base layer, and
    there its values are lost.)

    Raises:
        AdapterError: PEFT cannot load the folder, or a module, factor, scale or head tensor differs; names the first.
        ModelError: the base model's configuration cannot be loaded.
    """
    model = _loaded_by_peft(folder, base)
    layers, found = _lora_layers(model), _head_tensors(model)
    _same_names(folder, "module", layers, adapter.factors)
    _same_names(folder, "head tensor", found, adapter.head)
    for module, factors in adapter.factors.items():
        stored = _stored(factors)
        _same_tensor(folder, f"{module}.lora_A", layers[module].lora_A["default"].weight, stored.A)
        _same_tensor(folder, f"{module}.lora_B", layers[module].lora_B["default"].weight, stored.B)
        scale = layers[module].scaling["default"]
        if not _agree(scale, adapter.scale):
            raise AdapterError(f"{folder}: PEFT scales {module} by {scale}, but the adapter's scale is {adapter.scale}")
    for name, tensor in adapter.head.items():
        _same_tensor(folder, name, found[name], _float32(tensor))


def _loaded_by_peft(folder: Path, base: BaseModel) -> Any:
    model = _architecture(base)
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


def _architecture(base: BaseModel) -> Any:
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


@lru_cache(maxsize=8)
def _module_names(base: BaseModel) -> frozenset[str]:
    return frozenset(name for name, _ in _architecture(base).named_modules())


def _check_fit(adapter: Adapter, base: BaseModel) -> None:
    names = _module_names(base)
    strange = [module for module in adapter.factors if module not in names]
    if strange:
        raise AdapterError(f"{base.name} has no module {strange[0]!r} to adapt.{nearest(strange[0], names)}")
    if not adapter.factors:
        raise AdapterError(f"there is nothing to save: the adapter of {base.name} has no factors")
    whole = {module: any(name.startswith(f"{module}.") for name in adapter.head) for module in base.head_modules}
    loose = [name for name in adapter.head if not name.startswith(tuple(f"{module}." for module in whole))]
    if loose or not all(whole.values()):
        what = f"tensor {loose[0]!r} lies in none of them" if loose else "one of them has no tensors"
        raise AdapterError(f"the head does not fit the modules {', '.join(whole) or '(none)'} of {base.name}: {what}")


def _config_of(adapter: Adapter, base: BaseModel) -> dict[str, Any]:
    from peft import LoraConfig

    ranks = {module: max(1, rank) for module, rank in adapter.ranks.items()}
    largest = max(ranks.values())
    # The anchor makes a pattern exact: PEFT lets it match any module whose name ends with it.
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type="SEQ_CLS" if base.task == "classification" else "CAUSAL_LM",
        base_model_name_or_path=base.path,
        revision=base.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=_alpha(adapter.scale, largest),
        rank_pattern=others,
        alpha_pattern={pattern: _alpha(adapter.scale, rank) for pattern, rank in others.items()},
        target_modules=_exact_targets(list(ranks), _module_names(base)),
        modules_to_save=list(base.head_modules) or None,
    )
    fields: dict[str, Any] = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def _exact_targets(modules: list[str], names: Iterable[str]) -> list[str] | str:
    """Name exactly these modules: as a list, or as a regular expression where an entry would match other modules too.

    PEFT adapts every module whose name ends with a listed one; a regular expression must match the whole name.
    """
    endings = tuple(f".{module}" for module in modules)
    if any(name.endswith(endings) and name not in modules for name in names):
        return "|".join(re.escape(module) for module in modules)
    return modules


def _alpha(scale: float, rank: int) -> float:
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha  # PEFT declares an integer and takes both


def _stored(factors: Factors) -> Factors:
    if factors.rank == 0:
        return Factors(B=torch.zeros(factors.B.shape[0], 1), A=torch.zeros(1, factors.A.shape[1]))
    return Factors(B=_float32(factors.B), A=_float32(factors.A))


def _stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {f"{PREFIX}{name}": _float32(tensor) for name, tensor in adapter.head.items()}
    for module, factors in adapter.factors.items():
        stored = _stored(factors)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": stored.A, f"{PREFIX}{module}.lora_B.weight": stored.B}
    return tensors


def _safetensors(adapter: Adapter, label_names: tuple[str, ...]) -> bytes:
    """Return the bytes of the weights file: the same ones for the same adapter.

    The library writes its notes in a random order. The header (JSON after eight bytes of its length) is sorted here.
    """
    from safetensors.torch import save

    notes = {"format": "pt", "scale": repr(adapter.scale), "label_names": json.dumps(label_names)}
    data: bytes = save(_stored_tensors(adapter), metadata=notes)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def _float32(tensor: Tensor) -> Tensor:
    """Return a copy that shares nothing, as safetensors asks."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= ADAPTER_FILES):
        raise AdapterError(f"{folder} exists and holds something else than an adapter; it is left as it is")


def _move(beside: Path, folder: Path) -> None:
    old = beside.with_name(f"{beside.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {CONFIG_NAME} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: peft_type is {kind!r}; only 'LORA' is supported")
    for option in UNSUPPORTED:
        if config.get(option):
            raise AdapterError(f"{path}: {option} is {config[option]!r}; only plain LoRA is supported")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}; weights must be safetensors, never a pickle") from error


def _scale_of(folder: Path, config: Mapping[str, Any], factors: Mapping[str, Factors], noted: str | None) -> float:
    """Return alpha / r, which must be the same for all modules; as the writer noted it, if it noted that number."""
    scales = {}
    for module, pair in factors.items():
        try:
            rank = _for_module(config.get("rank_pattern"), module, config.get("r", 8))
            alpha = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            scales[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise AdapterError(f"{folder / CONFIG_NAME}: no rank and alpha for module {module!r}: {error}") from error
        if rank != pair.rank:
            raise AdapterError(f"{folder}: {module} has rank {rank} in {CONFIG_NAME} but {pair.rank} in {WEIGHTS_NAME}")
    first, scale = next(iter(scales.items()))
    for module, other in scales.items():
        if not _agree(other, scale):
            raise AdapterError(
                f"{folder / CONFIG_NAME}: alpha / r is {scale} for {first} but {other} for {module}; "
                "an adapter has one scale for all modules"
            )
    with contextlib.suppress(ValueError):
        return float(noted) if noted is not None and _agree(float(noted), scale) else scale
    return scale


def _for_module(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Choose as PEFT does: the first pattern that matches the end of the module's name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _agree(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-12)  # a few roundings of float64; float32 sees no difference


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
