"""The simulated clock: how long a client's part in a round takes on its machine and link, and what it computes.

One client's round is a download, the training and an upload, one after the other. Floating-point operations are
counted from the model and the tokens (padding included, since a batch is a rectangle):

    forward   2 (P + p) per token        P: weights of the frozen linear layers,  p: parameters of the adapter
    backward  2 (P + p) per token        for the gradients of the activations, which pass the frozen layers too
              2 p       per token        for the gradients of the factors; frozen weights have none

so 4 P + 6 p in all. Attention scores, norms and the optimiser are not counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.platform.data.federated import FederatedData
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.trainer import batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one client's part in a round costs, but for what the bytes and the rank decide.

    Attributes:
        downlink_bit_per_s: may be infinite, like every rate here.
        delay_down_s: added to the download.
        flop: operations of training on the frozen weights; ``flop_per_rank`` on each rank of the adapter.
        flop_per_rank: see ``flop``.
        speed_flop_per_s: sustained speed of the machine.
        power_w: drawn while training; 0 if unknown.
        uplink_bit_per_s: at the bandwidth that the client was given.
        delay_up_s: added to the upload.
        transmit_power_w: drawn while sending; 0 if unknown.
        bandwidth_hz: of a shared band; NaN if there is none.
        deadline_s: of the round, infinite if it has none.
    """

    downlink_bit_per_s: float
    delay_down_s: float
    flop: float
    flop_per_rank: float
    speed_flop_per_s: float
    power_w: float = 0.0
    uplink_bit_per_s: float
    delay_up_s: float
    transmit_power_w: float = 0.0
    bandwidth_hz: float = math.nan
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Elapsed:
    """One client's part in a round on the simulated clock; ``upload_s`` is 0 until there is something to upload."""

    download_s: float
    compute_s: float
    upload_s: float
    flop: float
    energy_j: float

    @property
    def total_s(self) -> float:
        """From the start of the round until the server has the update."""
        return self.download_s + self.compute_s + self.upload_s


def elapsed(timing: Timing, *, rank: float, bytes_down: int, bytes_up: int | None) -> Elapsed:
    """Return the times of a client that trains ``rank`` ranks; without ``bytes_up`` those before the upload."""
    flop = timing.flop + rank * timing.flop_per_rank
    compute_s = flop / timing.speed_flop_per_s
    upload_s = 0.0
    if bytes_up is not None:
        upload_s = _seconds(bytes_up, timing.uplink_bit_per_s) + timing.delay_up_s
    return Elapsed(
        download_s=_seconds(bytes_down, timing.downlink_bit_per_s) + timing.delay_down_s,
        compute_s=compute_s,
        upload_s=upload_s,
        flop=flop,
        energy_j=timing.power_w * compute_s + timing.transmit_power_w * upload_s,
    )


def _seconds(num_bytes: int, bit_per_s: float) -> float:
    """Return how long bytes take; over a link that is dead, for ever."""
    return 8 * num_bytes / bit_per_s if bit_per_s > 0 else math.inf


def lateness(timing: Timing | None, times: Elapsed | None) -> str | None:
    """Say that an update comes after the deadline, or nothing."""
    if timing is None or times is None or times.total_s <= timing.deadline_s:
        return None
    return f"{times.total_s:.4g} s is past the deadline of {timing.deadline_s:g} s"


def training_tokens(data: FederatedData, settings: TrainingSection, client: str, seed: int) -> int:
    """Return the tokens that :func:`~fedloom.platform.trainer.train_client` will train on, padding included."""
    total = 0
    for indices in batches(data.clients[client], settings, seed):
        lengths = data.offsets[indices + 1] - data.offsets[indices]
        total += len(indices) * int(lengths.max(initial=0))
    return total


def flop_of(tokens: int, base_parameters: int, shapes: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """Return the operations of training on ``tokens``: those on the frozen weights, and those per rank."""
    per_rank = sum(d_out + d_in for d_out, d_in in shapes.values())
    return 4.0 * base_parameters * tokens, 6.0 * per_rank * tokens
