"""What leaves the server: chunks of dispatches for client actors, and snapshots of its own state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.platform.client import Client
from fedloom.platform.experiment import TrainingSection, UpdateSection
from fedloom.platform.wire import Packet
from fedloom.platform.world.clock import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One client's dispatch on its way: header, which of the chunk's payloads it gets, and the bytes it is charged.

    ``timing`` says how long its part takes on the simulated clock, if that is asked for. ``memory`` is what the client
    has kept itself: it travels in the simulation alone, and no byte of it is charged.
    """

    client: Client
    header: Mapping[str, Any]
    payload: int
    bytes_down: int
    timing: Timing | None = None
    memory: Packet | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SentChunk:
    """A chunk on its way to a client actor, with all that training it depends on.

    Attributes:
        run: the run that it belongs to, under a name of its own.
        number: the round, counted from 0.
        seed: the experiment's.
        method: the method's name; ``options`` are its options.
        updates: what is taken from clients.
        training: how they train.
        clients: the clients, in cohort order.
        payloads: the distinct payloads: packets, or what stands for one that is stored for many readers.
        pieces: the pieces of the patch, likewise.
        patch_scale: the scale of the patch.
    """

    run: str
    number: int
    seed: int
    method: str
    options: Mapping[str, Any]
    updates: UpdateSection
    training: TrainingSection
    clients: tuple[Sent, ...]
    payloads: tuple[Any, ...]
    pieces: tuple[Any, ...]
    patch_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a server has to know to go on with a run after a round.

    Attributes:
        state: the tensors of the method's state but for its patch, and the clients' memories; the rest of it is the
            packet's meta, as JSON values.
        pieces: the pieces of the patch, from some version on.
    """

    state: Packet
    pieces: tuple[Packet, ...]
