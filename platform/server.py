"""The server of one run: it holds the method's state, hands out dispatches and folds what comes back.

The same class works in the driver's process and as a Ray actor.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from fedloom.platform.adapter import Adapter, Factors, Patch, Template, compose
from fedloom.platform.aggregation import method_of
from fedloom.platform.errors import RoundError
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Dispatch, Personal, State
from fedloom.platform.partial import Fold
from fedloom.platform.population import Chunk, Task
from fedloom.platform.seeds import generator_for
from fedloom.platform.sent import Sent, SentChunk, Snapshot
from fedloom.platform.wire import (
    Packet,
    dispatch_header,
    memories_in,
    memory_tensors,
    pack,
    pack_adapter,
    pack_factors,
    pack_payload,
    unpack,
    unpack_factors,
    unpack_partial,
)


class Server:
    """The state of one run after another."""

    def __init__(self, *, threads: int = 1, share: Callable[[Packet], Any] = lambda packet: packet) -> None:
        """Make a server. ``share`` stores a packet once for many readers and returns what stands for it."""
        torch.set_num_threads(threads)
        self._share = share

    def begin(
        self, experiment: Experiment, shapes: Mapping[str, tuple[int, int]], rank: int, head: Packet, run: str
    ) -> None:
        """Start a run: the method's state before round 0.

        Args:
            experiment: the resolved experiment.
            shapes: (d_out, d_in) by target module.
            rank: the global rank.
            head: the packed head before round 0.
            run: a name that no other run of these actors has.
        """
        self._experiment = experiment
        self._run = run
        self._method = method_of(
            experiment.method.name,
            experiment.method.options,
            experiment.updates,
            experiment.seed,
            experiment.cohort.places,
        )
        template = Template(
            shapes=shapes,
            head={name: tensor.clone() for name, tensor in unpack(head).items()},
            rank=rank,
            scale=experiment.adapter.scale,
        )
        self._state: State = self._method.init(template, generator_for(experiment.seed, "init"))
        self._pieces: list[Any] = []
        self._held: dict[str, int] = {}  # the version of the patch that each client has
        self._memories: dict[str, Mapping[str, Tensor]] = {}  # by client; none of it is the server's to read
        self._open_round()

    def ping(self) -> None:
        """Answer, to show that the server is there."""

    def snapshot(self, since: int = 0) -> Snapshot:
        """Return what :meth:`restore` takes, with the pieces of the patch from version ``since`` on."""
        state = self._state
        adapter = {f"adapter/{name}": tensor for name, tensor in state.adapter.tensors().items()}
        slots = {f"slots/{name}": tensor for name, tensor in state.slots.items()}
        memories, kept = memory_tensors(self._memories)
        pieces = state.patch.pieces if state.patch is not None else ()
        meta = {
            **kept,
            "round": state.round,
            "seed": state.seed,
            "scale": state.adapter.scale,
            "patch_scale": None if state.patch is None else state.patch.scale,
            "held": self._held,
            "order": [*adapter, *slots],
        }
        return Snapshot(
            state=pack(adapter | slots | memories, meta), pieces=tuple(pack_factors(piece) for piece in pieces[since:])
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot with all pieces of the patch; ``begin`` has been called with the same experiment."""
        meta = snapshot.state.meta
        saved = unpack(snapshot.state)
        # Files sort their tensors by name. Draws for one tensor after the other, and ties, go by the order of before.
        flat = {name: saved[name].clone() for name in meta.get("order", saved)}
        pieces = tuple(_copied(unpack_factors(piece)) for piece in snapshot.pieces)
        self._state = State(
            round=meta["round"],
            seed=meta["seed"],
            adapter=Adapter.from_tensors(_under("adapter/", flat), meta["scale"]),
            patch=None if meta["patch_scale"] is None else Patch(pieces=pieces, scale=meta["patch_scale"]),
            slots=_under("slots/", flat),
        )
        self._held = dict(meta["held"])
        memories = memories_in(snapshot.state)
        self._memories = {
            client: {name: kept.clone() for name, kept in memory.items()} for client, memory in memories.items()
        }
        self._pieces = [self._share(piece) for piece in snapshot.pieces]
        self._open_round()

    def dispatch(self, chunk: Chunk) -> SentChunk:
        """Make the dispatches of a chunk. Payloads that are the same for many clients are stored once a round."""
        experiment = self._experiment
        payloads: dict[Any, Any] = {}
        clients = tuple(self._sent(task, payloads) for task in chunk.tasks)
        return SentChunk(
            run=self._run,
            number=self._state.round,
            seed=experiment.seed,
            method=experiment.method.name,
            options=experiment.method.options,
            updates=experiment.updates,
            training=experiment.training,
            clients=clients,
            payloads=tuple(payloads.values()),
            pieces=tuple(self._pieces),
            patch_scale=experiment.adapter.scale,
        )

    def fold(self, index: int, partial: Packet) -> None:
        """Merge the partial of chunk ``index``; chunks that come early wait for their turn.

        One that was merged already, or that belongs to another round or run, is counted and left out.
        """
        if (partial.meta["run"], partial.meta["round"]) != (self._run, self._state.round):
            self._left_out["stale"] += 1
            return
        if index < self._next or index in self._waiting:
            self._left_out["duplicate"] += 1
            return
        self._waiting[index] = partial
        while self._next in self._waiting:
            packet = self._waiting.pop(self._next)
            ready = unpack_partial(packet)
            if ready.count:
                self._fold.add(ready)
                self._learnt |= memories_in(packet)
            self._next += 1

    def dispatch_all(self, chunks: Sequence[Chunk]) -> list[SentChunk]:
        """Make the dispatches of several chunks."""
        return [self.dispatch(chunk) for chunk in chunks]

    def fold_all(self, indices: Sequence[int], partials: Sequence[Packet]) -> None:
        """Merge the partials of several chunks."""
        for index, partial in zip(indices, partials, strict=True):
            self.fold(index, partial)

    def finish(self, num_chunks: int) -> dict[str, float]:
        """Close the round: the new state. Returns the mean, smallest and largest rank of the global model's modules.

        A round without a single update leaves the model as it was, and counts: whether it may is the driver's to say.

        Raises:
            RoundError: a chunk is missing.
        """
        if self._next != num_chunks:
            raise RoundError(f"round {self._state.round}: chunk {self._next} of {num_chunks} has not arrived")
        if self._state.patch is not None:
            self._held |= dict.fromkeys(self._sent_to, self._state.patch.version)
        if self._fold.count:
            self._state = self._method.finish(self._state, self._fold.result())
        else:
            self._state = replace(self._state, round=self._state.round + 1)
        self._memories |= {
            client: {name: tensor.clone() for name, tensor in memory.items()} for client, memory in self._learnt.items()
        }
        patch = self._state.patch
        for piece in patch.pieces[len(self._pieces) :] if patch is not None else ():
            self._pieces.append(self._share(pack_factors(piece)))
        left_out = {f"refused/{kind}": float(count) for kind, count in self._left_out.items()}
        self._open_round()
        ranks = self._global_ranks()
        return {"rank/mean": sum(ranks) / len(ranks), "rank/min": min(ranks), "rank/max": max(ranks), **left_out}

    def export(self) -> Packet:
        """Return the global model as one adapter, its patch included."""
        return pack_adapter(self._global())

    def export_personal(self, client: str) -> Packet:
        """Return one client's own model, where the method gives it one."""
        return pack_adapter(cast(Personal, self._method).personal(self._state, self._memories.get(client, {})))

    def _global(self) -> Adapter:
        return compose(*self._method.export(self._state))

    def _global_ranks(self) -> list[int]:
        """Ranks of the global model by module, counted without putting the patch's pieces side by side."""
        adapter, patch = self._method.export(self._state)
        pieces = patch.pieces if patch is not None else ()
        return [rank + sum(piece[module].rank for piece in pieces) for module, rank in adapter.ranks.items()]

    def _open_round(self) -> None:
        self._fold = Fold()
        self._left_out: Counter[str] = Counter()
        # What clients hold changes at the end of the round, so that one that is asked again is charged the same.
        self._sent_to: list[str] = []
        self._learnt: dict[str, Mapping[str, Tensor]] = {}
        self._next = 0
        self._waiting: dict[int, Packet] = {}
        self._shared: dict[str, Any] = {}

    def _sent(self, task: Task, payloads: dict[Any, Any]) -> Sent:
        client = task.client
        generator = generator_for(self._experiment.seed, "round", self._state.round, "client", client.id, "dispatch")
        memory = self._memories.get(client.id, {})
        dispatch = self._method.dispatch(self._state, replace(client, memory=memory), task.budget, generator)
        missed = 0
        if self._state.patch is not None:
            missed = self._state.patch.num_bytes(since=self._held.get(client.id, 0))
            self._sent_to.append(client.id)
        key = dispatch.shared or (client.id,)
        if key not in payloads:
            payloads[key] = self._stored(dispatch)
        return Sent(
            client=client,
            header=dispatch_header(dispatch),
            payload=list(payloads).index(key),
            bytes_down=dispatch.payload.num_bytes + missed,
            timing=task.timing,
            memory=pack(memory) if memory else None,
        )

    def _stored(self, dispatch: Dispatch) -> Any:
        if dispatch.shared is None:
            return pack_payload(dispatch.payload)
        if dispatch.shared not in self._shared:
            self._shared[dispatch.shared] = self._share(pack_payload(dispatch.payload))
        return self._shared[dispatch.shared]


def _under(prefix: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}


def _copied(piece: Mapping[str, Factors]) -> dict[str, Factors]:
    return {module: Factors(B=pair.B.clone(), A=pair.A.clone()) for module, pair in piece.items()}
