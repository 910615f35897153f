"""Adapters at rest, in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, never a pickle.

PEFT multiplies a module's product by ``alpha / r``. Here the scale s belongs to the adapter, so every module of rank r
gets ``alpha = s * r``: as the folder's default for the largest rank, as ``rank_pattern`` and ``alpha_pattern`` for the
others. PEFT has no rank 0; such a module is stored as rank 1 with both factors zero.

In float64 ``alpha / r`` may miss s by one unit in the last place, which float32 arithmetic cannot see. So s itself
stands in the header of the safetensors file, beside the class names; PEFT ignores both.
"""

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.platform.adapter import Adapter
from fedloom.platform.errors import AdapterError, nearest
from fedloom.platform.peft_check import verify_adapter
from fedloom.platform.peft_layout import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    BaseModel,
    architecture,
    float32_copy,
    storable,
)
from fedloom.platform.peft_read import load_adapter

__all__ = ["BaseModel", "load_adapter", "save_adapter", "verify_adapter"]

ADAPTER_FILES = {CONFIG_NAME, WEIGHTS_NAME, "README.md"}


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
