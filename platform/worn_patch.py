"""What a worker's model wears beside a client's adapter: the patch, and factors that this client does not train."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedloom.platform.adapter import Factors, Patch
from fedloom.platform.sent import SentChunk
from fedloom.platform.wire import Packet, unpack_factors


class WornPatch:
    """The patch of a run, piece by piece as chunks bring it."""

    def __init__(self, packet: Callable[[Any], Packet]) -> None:
        """``packet`` turns what stands for a piece into the piece."""
        self._packet = packet
        self._version = ("", 0)  # the run, and the number of pieces
        self._pieces: list[dict[str, Factors]] = []
        self._factors: dict[str, Factors] = {}

    def of(self, chunk: SentChunk) -> Mapping[str, Factors] | None:
        """Put the pieces of the patch side by side, once per version; pieces that are here are not fetched again."""
        if not chunk.pieces:
            return None
        if self._version != (chunk.run, len(chunk.pieces)):
            if self._version[0] != chunk.run:
                self._pieces = []
            self._pieces += [unpack_factors(self._packet(piece)) for piece in chunk.pieces[len(self._pieces) :]]
            self._version = (chunk.run, len(chunk.pieces))
            self._factors = Patch(pieces=tuple(self._pieces), scale=chunk.patch_scale).factors()
        return self._factors


def side_by_side(patch: Mapping[str, Factors] | None, frozen: Mapping[str, Factors]) -> Mapping[str, Factors] | None:
    """Return what a client wears over the base model: the patch, and the ranks that it does not train."""
    if not frozen or patch is None:
        return frozen or patch
    return {
        module: Factors(B=torch.cat([own.B, frozen[module].B], dim=1), A=torch.cat([own.A, frozen[module].A]))
        for module, own in patch.items()
    }
