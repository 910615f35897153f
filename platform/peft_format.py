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
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.platform.adapter import Adapter
from fedloom.platform.errors import AdapterError, clipped, nearest
from fedloom.platform.peft_check import verify_adapter
from fedloom.platform.peft_layout import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    BaseModel,
    Origin,
    architecture,
    float32_copy,
    storable,
)
from fedloom.platform.peft_read import load_adapter

__all__ = [
    "BaseModel",
    "check_place",
    "load_adapter",
    "put_in_place",
    "save_adapter",
    "verify_adapter",
    "whole_names",
    "write_files",
]

ADAPTER_FILES = {CONFIG_NAME, WEIGHTS_NAME, "README.md"}


def save_adapter(folder: Path, adapter: Adapter, base: BaseModel) -> Path:
    """Write an adapter in float32 as a folder that ``PeftModel.from_pretrained`` loads, and return the folder.

    It is written beside and renamed into place. An earlier adapter of the same name is replaced.

    Raises:
        AdapterError: the adapter does not fit the base model, or the folder holds something else than an adapter.
        ModelError: the base model's configuration cannot be loaded.
    """
    _check_fit(adapter, base)
    origin = Origin(
        task_type="SEQ_CLS" if base.task == "classification" else "CAUSAL_LM",
        base_model=base.path,
        revision=base.revision,
        head_modules=base.head_modules,
    )
    targets = _exact_targets(list(adapter.factors), _module_names(base))
    with put_in_place(folder, replaces=ADAPTER_FILES) as beside:
        write_files(beside, adapter, origin, targets, {"label_names": json.dumps(base.label_names)})
    return folder


def write_files(
    folder: Path, adapter: Adapter, origin: Origin, targets: list[str] | str, notes: Mapping[str, str]
) -> None:
    """Write an adapter's two files into a folder that is there.

    Args:
        folder: where they shall stand.
        adapter: stored in float32.
        origin: the model that it belongs to.
        targets: what PEFT finds the adapted modules by: their names, or a regular expression for the whole name.
        notes: further entries for the header of the weights file, which PEFT ignores.
    """
    (folder / WEIGHTS_NAME).write_bytes(_safetensors(adapter, notes))
    text = json.dumps(_config_of(adapter, origin, targets), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def check_place(folder: Path, *, replaces: Collection[str]) -> None:
    """See that a folder may be written: it is not there, or holds no other files than those in ``replaces``.

    Raises:
        AdapterError: it holds something else, or has no name.
    """
    if not folder.name:
        raise AdapterError(f"{clipped(repr(str(folder)))} is no name for a new folder")
    if folder.exists() and not (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= set(replaces)):
        what = "holds something else than an adapter" if replaces else "is no empty folder"
        raise AdapterError(f"{clipped(folder)} exists and {what}; it is left as it is")


@contextlib.contextmanager
def put_in_place(folder: Path, *, replaces: Collection[str]) -> Iterator[Path]:
    """Give a new folder beside ``folder`` to write into, which takes its place if all goes well and else is removed.

    Raises:
        AdapterError: as :func:`check_place`.
    """
    check_place(folder, replaces=replaces)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        yield beside
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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


def _config_of(adapter: Adapter, origin: Origin, targets: list[str] | str) -> dict[str, Any]:
    from peft import LoraConfig

    ranks = {module: max(1, rank) for module, rank in adapter.ranks.items()}
    largest = max(ranks.values())
    # The anchor makes a pattern exact: PEFT lets it match any module whose name ends with it.
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type=origin.task_type,
        base_model_name_or_path=origin.base_model,
        revision=origin.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=_alpha(adapter.scale, largest),
        rank_pattern=others,
        alpha_pattern={pattern: _alpha(adapter.scale, rank) for pattern, rank in others.items()},
        target_modules=targets,
        modules_to_save=list(origin.head_modules) or None,
        fan_in_fan_out=origin.fan_in_fan_out,
    )
    fields: dict[str, Any] = config.to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def _exact_targets(modules: list[str], names: Iterable[str]) -> list[str] | str:
    """Name exactly these modules: as a list, or as a regular expression where an entry would match other modules too.

    PEFT adapts every module whose name ends with a listed one; a regular expression must match the whole name.
    """
    endings = tuple(f".{module}" for module in modules)
    if any(name.endswith(endings) and name not in modules for name in names):
        return whole_names(modules)
    return modules


def whole_names(modules: Iterable[str]) -> str:
    """Return a regular expression that matches these modules and no other."""
    return "|".join(re.escape(module) for module in modules)


def _alpha(scale: float, rank: int) -> float:
    alpha = float(scale) * rank
    return int(alpha) if alpha.is_integer() else alpha  # PEFT declares an integer and takes both


def _stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {f"{PREFIX}{name}": float32_copy(tensor) for name, tensor in adapter.head.items()}
    for module, factors in adapter.factors.items():
        stored = storable(factors)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": stored.A, f"{PREFIX}{module}.lora_B.weight": stored.B}
    return tensors


def _safetensors(adapter: Adapter, notes: Mapping[str, str]) -> bytes:
    """Return the bytes of the weights file: the same ones for the same adapter.

    The library writes its notes in a random order. The header (JSON after eight bytes of its length) is sorted here.
    """
    from safetensors.torch import save

    header_notes = {"format": "pt", "scale": repr(float(adapter.scale)), **notes}
    data: bytes = save(_stored_tensors(adapter), metadata=header_notes)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


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
