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
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError, nearest
from fedloom.platform.peft_check import verify_adapter
from fedloom.platform.peft_layout import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    BaseModel,
    architecture,
    float32_copy,
    scales_agree,
    storable,
)

__all__ = ["BaseModel", "load_adapter", "save_adapter", "verify_adapter"]

ADAPTER_FILES = {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters")


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

    Modules come in alphabetical order. A module that was saved with rank 0 comes back with rank 1, all zeros.

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


@lru_cache(maxsize=8)
def _module_names(base: BaseModel) -> frozenset[str]:
    return frozenset(name for name, _ in architecture(base).named_modules())


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
    alpha = float(scale) * rank
    return int(alpha) if alpha.is_integer() else alpha  # PEFT declares an integer and takes both


def _stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {f"{PREFIX}{name}": float32_copy(tensor) for name, tensor in adapter.head.items()}
    for module, factors in adapter.factors.items():
        stored = storable(factors)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": stored.A, f"{PREFIX}{module}.lora_B.weight": stored.B}
    return tensors


def _safetensors(adapter: Adapter, label_names: tuple[str, ...]) -> bytes:
    """Return the bytes of the weights file: the same ones for the same adapter.

    The library writes its notes in a random order. The header (JSON after eight bytes of its length) is sorted here.
    """
    from safetensors.torch import save

    notes = {"format": "pt", "scale": repr(float(adapter.scale)), "label_names": json.dumps(label_names)}
    data: bytes = save(_stored_tensors(adapter), metadata=notes)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


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
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {CONFIG_NAME} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: peft_type is {kind!r}; only 'LORA' is supported")
    for patterns in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(patterns) or {}, dict):
            raise AdapterError(f"{path}: {patterns} is {config[patterns]!r}; it must map modules to numbers")
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
        if not scales_agree(other, scale):
            raise AdapterError(
                f"{folder / CONFIG_NAME}: alpha / r is {scale} for {first} but {other} for {module}; "
                "an adapter has one scale for all modules"
            )
    with contextlib.suppress(ValueError):
        return float(noted) if noted is not None and scales_agree(float(noted), scale) else scale
    return scale


def _for_module(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Choose as PEFT does: the first pattern that matches the end of the module's name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
