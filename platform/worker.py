"""A client's machine: one base model that trains the clients of a chunk one after the other.

The same class works in the driver's process and as a Ray actor.
"""

import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.platform.adapter import Adapter, Factors, Patch
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.evaluation import Score, score
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.method import Client, Dispatch, Fold, Method, Partial, Payload, received_adapter
from fedloom.platform.registry import build_method
from fedloom.platform.seeds import seed_for
from fedloom.platform.server import Sent, SentChunk
from fedloom.platform.trainer import Trained, train_client
from fedloom.platform.wire import (
    Packet,
    dispatch_from,
    pack,
    pack_partial,
    unpack_adapter,
    unpack_factors,
    unpack_payload,
)
from fedloom.platform.world.clock import Timing, elapsed, lateness


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one client's part in a round.

    ``rank`` is what it trained, the mean over modules weighted by their d_out + d_in; ``ratio`` the share of the global
    rank that it trained and sent. ``seconds`` are real; ``download_s``,
    ``compute_s`` and ``upload_s`` pass on the simulated clock. ``importance`` is the energy of the trained adapter, see
    :func:`energy`. ``refused`` says why an update was left out, if it was; ``fault`` is ``out_of_memory`` or ``errors``
    if that is what happened. ``retries`` counts how often it was done again after the loss of an actor.
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


class ClientWorker:
    """One base model, worn by one client after the other."""

    def __init__(
        self,
        spec: ModelSpec,
        data: FederatedData,
        *,
        device: str,
        threads: int,
        fetch: Callable[[Any], Packet] = lambda reference: reference,
    ) -> None:
        """Load the base model. ``fetch`` turns what a chunk carries in place of a shared packet into the packet."""
        self._threads = threads
        self._host = AdapterHost(spec, device=device)
        self._shapes = self._host.shapes
        self._data = data
        self._fetch = fetch
        self._patch_of = ("", 0)
        self._pieces: list[dict[str, Factors]] = []
        self._patch_factors: dict[str, Factors] = {}

    def ping(self) -> None:
        """Answer, to show that the actor is there."""

    def initial_head(self, seed: int) -> Packet:
        """Return the head before round 0, see :meth:`AdapterHost.initial_head`."""
        return pack(self._host.initial_head(seed))

    def train(self, chunk: SentChunk) -> tuple[Packet | None, list[Record]]:
        """Train the clients of a chunk, in order, and fold their updates into one partial.

        An update that is not finite is left out, and its record says so.
        """
        torch.set_num_threads(self._threads)
        method = build_method(chunk.method, chunk.options)
        payloads = [unpack_payload(self._packet(given)) for given in chunk.payloads]
        fold = Fold()
        records = []
        for sent in chunk.clients:
            dispatch = dispatch_from(sent.header, payloads[sent.payload])
            record, partial = self._take_part(chunk, sent, dispatch, method)
            records.append(record)
            if partial is not None:
                fold.add(partial)
        accepted = any(record.refused is None for record in records)
        return (pack_partial(fold.result()) if accepted else None), records

    def _take_part(
        self, chunk: SentChunk, sent: Sent, dispatch: Dispatch, method: Method
    ) -> tuple[Record, Partial | None]:
        """Train one client, unless it cannot be in time, and lift its update, unless it must be left out."""
        begin = time.perf_counter()
        rank = mean_rank(dispatch, self._shapes)
        known = Record(
            client=sent.client.id,
            profile=sent.client.profile,
            rank=rank,
            num_examples=sent.client.num_examples,
            bytes_down=sent.bytes_down,
            ratio=dispatch.ratio * rank / dispatch.global_rank,
        )
        known = timed(known, sent.timing, bytes_up=None)
        if known.refused is not None:
            return known, None
        try:
            trained = self.train_client(chunk, sent.client, dispatch)
            payload = method.upload(dispatch, trained.adapter)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return replace(known, refused=f"out of memory: {error}", fault="out_of_memory"), None
        except Exception as error:  # whatever the user's model, data or method raises ends one client, not the actor
            return replace(known, refused=f"an error in training: {_in_words(error)}", fault="errors"), None
        known = timed(known, sent.timing, bytes_up=payload.num_bytes)
        refused = refusal(payload, trained.loss) or known.refused
        record = replace(
            known,
            bytes_up=payload.num_bytes,
            loss=trained.loss,
            steps=trained.steps,
            importance=math.nan if sent.timing is None else energy(trained.adapter),
            seconds=time.perf_counter() - begin,
            refused=refused,
        )
        if refused is not None:
            return record, None
        return record, method.lift(dispatch, payload, float(sent.client.num_examples))

    def train_all(self, chunks: Sequence[SentChunk]) -> tuple[list[Packet | None], list[list[Record]]]:
        """Train several chunks; their partials stay apart, since they are folded in the order of all chunks."""
        done = [self.train(chunk) for chunk in chunks]
        return [partial for partial, _ in done], [records for _, records in done]

    def train_client(self, chunk: SentChunk, client: Client, dispatch: Dispatch) -> Trained:
        """Train one client on its own examples."""
        return train_client(
            self._host,
            self._data,
            TrainingSection.model_validate(chunk.training),
            dispatch=dispatch,
            received=received_adapter(dispatch, self._shapes),
            patch=self._patch(chunk),
            patch_scale=chunk.patch_scale,
            client=client.id,
            seed=seed_for(chunk.seed, "round", chunk.number, "client", client.id),
        )

    def score(self, adapter: Packet, indices: np.ndarray, batch_size: int) -> Score:
        """Score one shard of the held-out split."""
        torch.set_num_threads(self._threads)
        return score(self._host, self._data, unpack_adapter(adapter), indices, batch_size)

    def _packet(self, given: Any) -> Packet:
        """Return what travels with the chunk itself, or fetch what was stored once for many readers."""
        return given if isinstance(given, Packet) else self._fetch(given)

    def _patch(self, chunk: SentChunk) -> Mapping[str, Factors] | None:
        """Put the pieces of the patch side by side, once per version; pieces that are here are not fetched again."""
        if not chunk.pieces:
            return None
        if self._patch_of != (chunk.run, len(chunk.pieces)):
            if self._patch_of[0] != chunk.run:
                self._pieces = []
            self._pieces += [unpack_factors(self._packet(piece)) for piece in chunk.pieces[len(self._pieces) :]]
            self._patch_of = (chunk.run, len(chunk.pieces))
            self._patch_factors = Patch(pieces=tuple(self._pieces), scale=chunk.patch_scale).factors()
        return self._patch_factors


def _in_words(error: Exception) -> str:
    """Return an exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def mean_rank(dispatch: Dispatch, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Return the rank that a client trains: its mean over modules, weighted by their d_out + d_in."""
    if not dispatch.ranks:
        return float(dispatch.rank)
    sizes = {module: d_out + d_in for module, (d_out, d_in) in shapes.items()}
    return sum(dispatch.ranks[module] * size for module, size in sizes.items()) / sum(sizes.values())


def timed(record: Record, timing: Timing | None, *, bytes_up: int | None) -> Record:
    """Return the record with its simulated times, refused if they are past the deadline."""
    if timing is None:
        return record
    times = elapsed(timing, rank=record.rank, bytes_down=record.bytes_down, bytes_up=bytes_up)
    return replace(
        record,
        bandwidth_hz=timing.bandwidth_hz,
        flop=times.flop,
        download_s=times.download_s,
        compute_s=times.compute_s,
        upload_s=times.upload_s,
        energy_j=times.energy_j,
        refused=lateness(timing, times),
    )


def energy(adapter: Adapter) -> float:
    """Return the sum over modules and ranks i of ||B[:, i]||^2 ||A[i, :]||^2.

    It is the squared norm of all products B A if their directions are orthogonal: what a client has to send, as TSFA
    weighs it (RECONSTRUCTED, see ``methods/tsfa.py``).
    """
    return sum(
        float((pair.B.float().square().sum(dim=0) * pair.A.float().square().sum(dim=1)).sum())
        for pair in adapter.factors.values()
    )


def refusal(payload: Payload, loss: float) -> str | None:
    """Say why an update must not be merged, or nothing."""
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    # A norm is finite only if every term is, and is one pass; only where one overflows is every term looked at.
    if torch.isfinite(torch.stack(torch._foreach_norm(list(payload.tensors.values())))).all():
        return None
    for name, tensor in payload.tensors.items():
        if not torch.isfinite(tensor).all():
            return f"tensor {name!r} is not finite"
    return None
