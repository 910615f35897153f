"""Reading adapters in PEFT's format that others wrote: every size is checked before anything is allocated."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    tensors, notes = _read_tensors(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor:
            pair = pairs.setdefault(factor[1], {})
            if factor[2] in pair:
                raise AdapterError(f"{folder / WEIGHTS_NAME}: {clipped(name)} stands there with and without {PREFIX!r}")
            pair[factor[2]] = tensor.float()
        elif name == key or "lora_" in name:
            raise AdapterError(
                f"{folder / WEIGHTS_NAME}: tensor {clipped(repr(key))} belongs to no plain LoRA layer of PEFT"
            )
        else:
            head[name] = tensor.float()
    alone = sorted(module for module, pair in pairs.items() if len(pair) == 1)
    if alone or not pairs:
        what = (
            f"module {clipped(repr(alone[0]))} has one factor without the other"
            if alone
            else "there are no LoRA factors"
        )
        raise AdapterError(f"{folder / WEIGHTS_NAME}: {what}")
    factors = {module: Factors(B=pair["B"], A=pair["A"]) for module, pair in pairs.items()}
    return Adapter(factors=factors, head=head, scale=_scale_of(folder, config, factors, notes.get("scale")))


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


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = check_weights(folder)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(f"{name!r} has the dtype {dtype}; allowed are {', '.join(DTYPES)}")
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{clipped(path)} cannot be read: {clipped(error)}; weights must be safetensors, never a pickle"
    )


def _scale_of(folder: Path, config: Mapping[str, Any], factors: Mapping[str, Factors], noted: str | None) -> float:
    """Return alpha / r, which must be the same for all modules; as the writer noted it, if it noted that number."""
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
    first, scale = next(iter(scales.items()))
    for module, other in scales.items():
        if not scales_agree(other, scale):
            raise AdapterError(
                f"{place}: alpha / r is {scale} for {clipped(first)} but {other} for {clipped(module)}; "
                "an adapter has one scale for all modules"
            )
    with contextlib.suppress(ValueError):
        return float(noted) if noted is not None and scales_agree(float(noted), scale) else scale
    return scale


def _finite(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{number!r} is not a finite number")
    return number
