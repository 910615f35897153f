"""Reading adapters in PEFT's format that others wrote: every size is checked before anything is allocated."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError, clipped
from fedloom.platform.peft_layout import CONFIG_NAME, PREFIX, WEIGHTS_NAME, scales_agree
from fedloom.platform.peft_patterns import chosen_by_pattern
from fedloom.platform.reading import check_regular, inside, read_bounded

UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters")
DTYPES = ("F64", "F32", "F16", "BF16")
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 2**33
MAX_HEADER_BYTES = 2**23  # some 50 000 tensors


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter that :func:`save_adapter` or PEFT wrote: the same values, in float32.

    Modules come in alphabetical order. A module that was saved with rank 0 comes back with rank 1, all zeros.

    Whatever the files hold, memory stays below 256 MiB and three times the size of the weights file: their sizes and
    what the header claims are checked before anything is allocated. Time does too: patterns are bounded.

    Raises:
        AdapterError: it is no such folder, an adapter of another kind, or its modules have different scales, or its
            patterns are more than :mod:`~fedloom.platform.peft_patterns` allows.
    """
    config = read_config(folder)
    tensors, notes = read_tensors(folder)
    factors, head = factors_and_head(folder, tensors)
    scales = module_scales(folder, config, factors)
    return Adapter(factors=factors, head=head, scale=_one_scale(folder, scales, notes.get("scale")))


def factors_and_head(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Sort the tensors of a weights file into the factors of modules and what else was trained, in float32.

    Raises:
        AdapterError: a tensor belongs to no plain LoRA layer, a factor is alone, or the two do not fit.
    """
    path = clipped(folder / WEIGHTS_NAME)
    pairs: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor:
            pair = pairs.setdefault(factor[1], {})
            if factor[2] in pair:
                raise AdapterError(f"{path}: {clipped(name)} stands there with and without {PREFIX!r}")
            pair[factor[2]] = tensor.float()
        elif name == key or "lora_" in name:
            raise AdapterError(f"{path}: tensor {clipped(repr(key))} belongs to no plain LoRA layer of PEFT")
        else:
            head[name] = tensor.float()
    if not pairs:
        raise AdapterError(f"{path}: there are no LoRA factors")
    factors = {}
    for module, pair in sorted(pairs.items()):
        if len(pair) == 1:
            raise AdapterError(f"{path}: module {clipped(repr(module))} has one factor without the other")
        try:
            factors[module] = Factors(B=pair["B"], A=pair["A"])
        except AdapterError as error:
            raise AdapterError(f"{path}, module {clipped(repr(module))}: {clipped(error)}") from error
    return factors, head


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``, at most ``MAX_CONFIG_BYTES``.

    Raises:
        AdapterError: it cannot be read, or is not that of plain LoRA.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(read_bounded(inside(folder, CONFIG_NAME), MAX_CONFIG_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = clipped(error)
        raise AdapterError(
            f"{clipped(folder)} is no adapter folder: {CONFIG_NAME} cannot be read ({reason})"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{clipped(path)}: peft_type is {clipped(repr(kind))}; only 'LORA' is supported")
    for option in UNSUPPORTED:
        if config.get(option):
            said = clipped(repr(config[option]))
            raise AdapterError(f"{clipped(path)}: {option} is {said}; only plain LoRA is supported")
    return config


def check_weights(folder: Path) -> Path:
    """Return the weights file after a look at its size and at the size that its header claims.

    Raises:
        AdapterError: it is no file, or larger than ``MAX_WEIGHTS_BYTES``, or its header is larger than
            ``MAX_HEADER_BYTES`` or than the file.
    """
    path = folder / WEIGHTS_NAME
    try:
        size = check_regular(inside(folder, WEIGHTS_NAME), MAX_WEIGHTS_BYTES)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES or header + 8 > size:
            raise ValueError(f"its header claims {header} bytes; the file has {size}, and {MAX_HEADER_BYTES} are read")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return path


def read_tensors(folder: Path, *, values: bool = True) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors of the weights file by name, and the notes in its header.

    Args:
        folder: the adapter's.
        values: whether the values are wanted. Without them tensors are on the device ``meta`` and cost nothing.

    Raises:
        AdapterError: the file cannot be read, or holds other tensors than floating-point ones.
    """
    from safetensors import SafetensorError, safe_open

    path = check_weights(folder)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(f"{name!r} has the dtype {dtype}; allowed are {', '.join(DTYPES)}")
            names, notes = file.keys(), file.metadata() or {}
            if values:
                return {name: file.get_tensor(name) for name in names}, notes
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}, notes
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{clipped(path)} cannot be read: {clipped(error)}; weights must be safetensors, never a pickle"
    )


def module_scales(folder: Path, config: Mapping[str, Any], factors: Mapping[str, Factors]) -> dict[str, float]:
    """Return what PEFT multiplies each module's product with: alpha / r, or alpha / sqrt(r) if it is rank-stabilised.

    Raises:
        AdapterError: a rank or alpha is no finite number, a rank is not that of the factors, or a pattern is more than
            :mod:`~fedloom.platform.peft_patterns` allows.
    """
    scales = {}
    place = clipped(folder / CONFIG_NAME)
    try:
        ranks = chosen_by_pattern(config, "rank_pattern", factors, config.get("r", 8))
        alphas = chosen_by_pattern(config, "alpha_pattern", factors, config.get("lora_alpha", 8))
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise AdapterError(f"{place}: {clipped(error, 500)}") from error
    for module, pair in factors.items():
        try:
            rank, alpha = _finite(ranks[module]), _finite(alphas[module])
            scales[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (ValueError, ArithmeticError) as error:
            said = f"no rank and alpha for module {clipped(repr(module))}: {clipped(error)}"
            raise AdapterError(f"{place}: {said}") from error
        if rank != pair.rank:
            said = f"{clipped(module)} has rank {clipped(rank)} in {CONFIG_NAME} but {pair.rank} in {WEIGHTS_NAME}"
            raise AdapterError(f"{clipped(folder)}: {said}")
    return scales


def _one_scale(folder: Path, scales: Mapping[str, float], noted: str | None) -> float:
    """Return the scale of all modules, which must be the same; as the writer noted it, if it noted that number."""
    first, scale = next(iter(scales.items()))
    for module, other in scales.items():
        if not scales_agree(other, scale):
            raise AdapterError(
                f"{clipped(folder / CONFIG_NAME)}: alpha / r is {scale} for {clipped(first)} but {other} for "
                f"{clipped(module)}; an adapter has one scale for all modules"
            )
    with contextlib.suppress(ValueError):
        return float(noted) if noted is not None and scales_agree(float(noted), scale) else scale
    return scale


def _finite(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{number!r} is not a finite number")
    return number
