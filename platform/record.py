"""One client's part in a round, on record: what it sent, computed and waited for, and why it was left out if it was."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.platform.adapter import Adapter
from fedloom.platform.method import Dispatch
from fedloom.platform.updates import Refusal
from fedloom.platform.world.clock import Timing, elapsed, lateness


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one client's part in a round.

    ``rank`` is what it trained, the mean over modules weighted by their d_out + d_in; ``ratio`` the share of the global
    rank that it trained and sent. ``seconds`` are real; ``download_s``,
    ``compute_s`` and ``upload_s`` pass on the simulated clock. ``importance`` is the energy of the trained adapter, see
    :func:`energy`. ``refused`` says why an update was left out, if it was, and ``fault`` is the kind of reason, see
    ``platform/updates.py``. ``retries`` counts how often it was done again after the loss of an actor. ``node`` names
    the node of a Ray cluster on which it ran; it is empty in one process.
    """

    client: str
    profile: str
    rank: float
    num_examples: int
    bytes_down: int
    bytes_up: int = 0
    loss: float = math.nan
    steps: int = 0
    seconds: float = 0.0
    refused: str | None = None
    fault: str | None = None
    retries: int = 0
    node: str = ""
    ratio: float = 1.0
    bandwidth_hz: float = math.nan
    flop: float = 0.0
    download_s: float = 0.0
    compute_s: float = 0.0
    upload_s: float = 0.0
    energy_j: float = 0.0
    importance: float = math.nan

    @property
    def latency_s(self) -> float:
        """Simulated seconds from the start of the round until the server has the update."""
        return self.download_s + self.compute_s + self.upload_s


def mean_rank(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Return the rank that a client trains: its mean over modules, weighted by their d_out + d_in."""
    if not dispatch.ranks:
        return float(dispatch.rank)
    sizes = {module: d_out + d_in for module, (d_out, d_in) in shapes.items()}
    return sum(dispatch.ranks[module] * size for module, size in sizes.items()) / sum(sizes.values())


def refused(record: Record, why: Refusal) -> Record:
    """Return the record of an update that is left out."""
    return replace(record, refused=why.reason, fault=why.kind)


def timed(record: Record, timing: Timing | None, *, bytes_up: int | None) -> Record:
    """Return the record with its simulated times, refused if they are past the deadline."""
    if timing is None:
        return record
    times = elapsed(timing, rank=record.rank, bytes_down=record.bytes_down, bytes_up=bytes_up)
    late = lateness(timing, times)
    return replace(
        record,
        bandwidth_hz=timing.bandwidth_hz,
        flop=times.flop,
        download_s=times.download_s,
        compute_s=times.compute_s,
        upload_s=times.upload_s,
        energy_j=times.energy_j,
        refused=late,
        fault="late" if late is not None else None,
    )


def energy(adapter: Adapter) -> float:
    """Return the sum over modules and ranks i of ||B[:, i]||^2 ||A[i, :]||^2.

    It is the squared norm of all products B A if their directions are orthogonal: what a client has to send, as TSFA
    weighs it (RECONSTRUCTED, see ``methods/tsfa.py``).
    """
    return sum(
        float((pair.B.float().square().sum(dim=0) * pair.A.float().square().sum(dim=1)).sum())
        for pair in (pair.folded() for pair in adapter.factors.values())
    )
