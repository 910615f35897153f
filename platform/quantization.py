"""Frozen weights of 4 or 8 bits, through bitsandbytes: where they can be had, and how Transformers makes them."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from fedloom.platform.errors import MachineError

INSTALL = "pip install 'fedloom[quantization]'"
INSTEAD = "Or set model.quantization: none; model.dtype: bfloat16 takes half of float32's memory."


def quantized_arguments(kind: str, dtype: str, device: str, *, whole: Sequence[str]) -> dict[str, Any]:
    """Return what ``from_pretrained`` is given for weights of a kind.

    Args:
        kind: ``none``, ``8bit`` (LLM.int8, arXiv:2208.07339) or ``4bit`` (NF4 of QLoRA, arXiv:2305.14314).
        dtype: in which the products are made.
        device: where the weights go.
        whole: modules that stay as they are, since they are trained.

    Raises:
        MachineError: bitsandbytes or a GPU is not there.
    """
    if kind == "none":
        return {}
    check_quantization(kind, device)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[*whole, "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantization(kind: str, device: str, *, here: bool = True) -> None:
    """Refuse weights of a kind where they cannot be had; packages are looked for only where that is ``here``.

    Raises:
        MachineError: with what would help.
    """
    if kind == "none":
        return
    if torch.device(device).type != "cuda":
        raise MachineError(
            f"key model.quantization: {kind!r} needs a GPU, and there is none for its clients. "
            f"Join a cluster that has GPUs with --address. {INSTEAD}"
        )
    if here and importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"key model.quantization: {kind!r} needs the package 'bitsandbytes', which is not installed here: "
            f"{INSTALL}. {INSTEAD}"
        )
