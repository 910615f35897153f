"""Tokenised examples in flat arrays, which client holds which, and how a batch is made of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
NO_LOSS = -100
"""The label that Transformers' loss ignores."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FederatedData:
    """Tokenised examples in flat arrays, so that they cross process borders without copies.

    The arrays may be read-only. Two values are the same data if their fingerprints are equal.

    Attributes:
        task: ``classification`` or ``causal_lm``.
        input_ids: int32 (num_tokens,): the tokens of all examples, one example after the other.
        offsets: int64 (num_examples + 1,): example i has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
        labels: int64 (num_examples,): the class; for causal_lm, how many leading tokens carry no loss.
        clients: int64 sorted indices of the training examples by client id; no example stands twice.
        test: int64 sorted indices of the held-out examples.
        held_out: for the same clients, int64 sorted indices of examples that they have and never train on, disjoint
            from those in ``clients``; empty if nothing is held out.
        label_names: the names of the classes; empty for causal_lm.
        pad_token_id: what fills a batch to a rectangle.
        fingerprint: sixteen hexadecimal digits over all of the above.
    """

    task: str
    input_ids: Int32
    offsets: Int64
    labels: Int64
    clients: Mapping[str, Int64]
    test: Int64
    label_names: tuple[str, ...]
    pad_token_id: int
    fingerprint: str
    held_out: Mapping[str, Int64] = field(default_factory=dict)

    def arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return flat arrays and JSON metadata for the wire; no array is copied but the clients' indices."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "offsets": self.offsets,
            "labels": self.labels,
            "test": self.test,
            **_flat("member", self.clients),
        }
        if self.held_out:  # else the fingerprint stays what it was before anything could be held out
            arrays |= _flat("held_out_member", self.held_out)
        meta = {
            "task": self.task,
            "clients": list(self.clients),
            "label_names": list(self.label_names),
            "pad_token_id": self.pad_token_id,
            "fingerprint": self.fingerprint,
        }
        return arrays, meta

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> "FederatedData":
        """Undo :meth:`arrays`; the value shares memory with the given arrays."""
        names = meta["clients"]
        return FederatedData(
            task=meta["task"],
            input_ids=arrays["input_ids"],
            offsets=arrays["offsets"],
            labels=arrays["labels"],
            clients=_by_client("member", names, arrays),
            test=arrays["test"],
            label_names=tuple(meta["label_names"]),
            pad_token_id=meta["pad_token_id"],
            fingerprint=meta["fingerprint"],
            held_out=_by_client("held_out_member", names, arrays) if "held_out_members" in arrays else {},
        )


def _flat(kind: str, by_client: Mapping[str, Int64]) -> dict[str, Int64]:
    """Return the clients' indices one after the other, and where each client's begin and end."""
    indices = list(by_client.values())
    return {
        f"{kind}s": np.concatenate([np.empty(0, np.int64), *indices]),
        f"{kind}_offsets": np.cumsum([0, *map(len, indices)], dtype=np.int64),
    }


def _by_client(kind: str, names: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Int64]:
    """Undo :func:`_flat`."""
    indices, offsets = arrays[f"{kind}s"], arrays[f"{kind}_offsets"]
    return {name: indices[offsets[i] : offsets[i + 1]] for i, name in enumerate(names)}


def fingerprint_of(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits over what :meth:`FederatedData.arrays` returns, whatever fingerprint that bears."""
    digest = hashlib.sha256(json.dumps({**meta, "fingerprint": ""}, sort_keys=True).encode())
    for name in sorted(arrays):
        values = arrays[name]
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]


def collate(data: FederatedData, indices: Int64) -> dict[str, torch.Tensor]:
    """Make one batch, as a Transformers model takes it.

    Args:
        data: the examples.
        indices: (n,) which of them, in the order of the batch.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 (n, longest), padded on the right; ``labels``, int64: (n,) classes,
        or for causal_lm (n, longest) with -100 where a token carries no loss. The model itself shifts them by one.
    """
    starts = data.offsets[indices][:, None]  # (n, 1)
    lengths = data.offsets[indices + 1][:, None] - starts  # (n, 1)
    positions = np.arange(lengths.max(initial=0))  # (longest,)
    present = positions < lengths  # (n, longest)
    tokens = data.input_ids[np.where(present, starts + positions, 0)]
    input_ids = np.where(present, tokens, data.pad_token_id).astype(np.int64)
    labels = data.labels[indices]
    if data.task == "causal_lm":
        labels = np.where(present & (positions >= labels[:, None]), input_ids, NO_LOSS)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(present.astype(np.int64)),
        "labels": torch.from_numpy(labels),
    }
