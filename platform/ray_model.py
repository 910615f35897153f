"""The base model in Ray's object store: loaded once, carried to each node once, read there by all actors in place."""

import logging
from collections.abc import Sequence
from typing import Any

import ray
import torch

from fedloom.platform.base_model import ModelSpec, load_base_model
from fedloom.platform.ray_cluster import GIB
from fedloom.platform.shared_model import NotShareableError, shared_model

logger = logging.getLogger(__name__)
LARGEST_SHARE = 0.5  # of a node's object store: the other half is for payloads, partials and data


def put_base_model(spec: ModelSpec) -> Any:
    """Load the base model in this process and put it into the object store; returns the reference.

    Where that cannot be, ``None``: every actor then loads it from files of its node. The reason is logged.

    Raises:
        ModelError: it cannot be loaded.
    """
    if spec.quantization != "none":
        return None  # quantized weights are made on the device that uses them
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    problem = too_large(_weights_bytes(spec), stores)
    if problem is None:
        try:
            return ray.put(shared_model(*load_base_model(spec, device="cpu")))
        except (NotShareableError, TypeError) as error:  # Ray raises the latter for what it cannot carry
            problem = str(error)
    logger.warning("every actor loads the base model %s for itself, since it cannot be shared: %s", spec.path, problem)
    return None


def too_large(weights_bytes: int, stores_bytes: Sequence[float]) -> str | None:
    """Say why weights do not go into the object stores of a cluster's nodes, or return ``None``."""
    smallest = min(stores_bytes)
    if weights_bytes <= LARGEST_SHARE * smallest:
        return None
    return (
        f"its weights take {weights_bytes / GIB:.3g} GiB, and the smallest object store of the cluster has "
        f"{smallest / GIB:.3g} GiB, of which they may take {LARGEST_SHARE:.0%}; start its nodes with a larger "
        "--object-store-memory"
    )


def _weights_bytes(spec: ModelSpec) -> int:
    """Count the weights without loading them."""
    model, _ = load_base_model(spec, device="meta")
    num_weights: int = sum(parameter.numel() for parameter in model.parameters())
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype.itemsize * num_weights
