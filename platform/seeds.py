"""Every random draw comes from a named seed; no global generator decides anything.

``seed_for(seed, "round", 3, "client", "c17", "batches")`` gives the same 63 bits on every machine and in every process.
"""

import hashlib

import torch


def seed_for(*names: str | int) -> int:
    """Hash a path of names to a seed in [0, 2**63).

    Names are joined with their types, so that ``("a", 1)`` and ``("a", "1")`` differ.
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(*names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`seed_for`."""
    return torch.Generator().manual_seed(seed_for(*names))
