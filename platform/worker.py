"""A client's machine: one base model that trains the clients of a chunk one after the other.

The same class works in the driver's process and as a Ray actor.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.aggregation import method_of
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.client import Client
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.evaluation import Score, score
from fedloom.platform.gpu_memory import GpuNeed
from fedloom.platform.method import Choosing, Dispatch, Method, Remembering
from fedloom.platform.partial import Fold, Partial
from fedloom.platform.received import frozen_factors, received_adapter
from fedloom.platform.record import Record, energy, mean_rank, refused, timed
from fedloom.platform.seeds import seed_for
from fedloom.platform.sent import Sent, SentChunk
from fedloom.platform.shared_model import SharedModel
from fedloom.platform.tasks.answers import TaskScore, answer
from fedloom.platform.tasks.questions import TaskShard
from fedloom.platform.trainer import Trained, train_client
from fedloom.platform.updates import Refusal, accepted, refusal_of, unusable
from fedloom.platform.wire import (
    Packet,
    dispatch_from,
    pack,
    pack_partial,
    unpack,
    unpack_adapter,
    unpack_payload,
)
from fedloom.platform.worn_patch import WornPatch, side_by_side


class Taken(NamedTuple):
    """An update that is merged, and what its client keeps."""

    partial: Partial
    memory: Mapping[str, Tensor]


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
        base: SharedModel | None = None,
        gpu: GpuNeed | None = None,
        make_host: Callable[..., AdapterHost] = AdapterHost,
        train: Callable[..., Trained] | None = None,
    ) -> None:
        """Load the base model, or build it from ``base``, once a GPU is known to hold what is needed of it.

        Args:
            spec: how to build the base model.
            data: what clients train on.
            device: where.
            threads: of this process.
            fetch: turns what a chunk carries in place of a shared packet into the packet.
            base: the base model, where it is not loaded here.
            gpu: what is needed of the device, where it is to be measured.
            make_host: loads the base model, given the specification and the device, and ``base`` if there is one.
            train: the trainer, in place of :func:`fedloom.platform.trainer.train_client` and with its arguments.

        Raises:
            ModelError: the base model cannot be loaded.
            ExperimentError: the GPU has too little memory.
        """
        if gpu is not None:
            gpu.check_device()
        self._threads = threads
        self._host = make_host(spec, device=device) if base is None else make_host(spec, device=device, base=base)
        self._train = train
        self._shapes = self._host.shapes
        self._data = data
        self._tokenizer: Any = None
        self._fetch = fetch
        self._patch = WornPatch(self._packet)

    def use(self, data: FederatedData) -> None:
        """Train on other data from now on."""
        self._data = data

    def initial_head(self, seed: int) -> Packet:
        """Return the head before round 0, see :meth:`AdapterHost.initial_head`."""
        return pack(self._host.initial_head(seed))

    def train(
        self, chunk: SentChunk, failed: Mapping[str, Refusal] = MappingProxyType({})
    ) -> tuple[Packet, list[Record]]:
        """Train the clients of a chunk, in order, and fold their updates into one partial.

        An update that must not be merged is left out, and its record says why. A partial without a single update says
        all the same which round it belongs to. Clients that are known to have ``failed`` are not trained again.
        """
        torch.set_num_threads(self._threads)
        method = method_of(chunk.method, chunk.options, chunk.updates, chunk.seed)
        payloads = [unpack_payload(self._packet(given)) for given in chunk.payloads]
        fold = Fold()
        memories = {}
        records = []
        for sent in chunk.clients:
            dispatch = dispatch_from(sent.header, payloads[sent.payload])
            if sent.memory is not None:
                dispatch = replace(dispatch, memory=unpack(sent.memory))
            record, taken = self._take_part(chunk, sent, dispatch, method, failed.get(sent.client.id))
            records.append(record)
            if taken is not None:
                fold.add(taken.partial)
                if taken.memory:
                    memories[sent.client.id] = taken.memory
        partial = fold.result() if fold.count else Partial(weight=0.0, count=0)
        return pack_partial(partial, memories, run=chunk.run, round=chunk.number), records

    def _take_part(
        self, chunk: SentChunk, sent: Sent, dispatch: Dispatch, method: Method, failed: Refusal | None
    ) -> tuple[Record, Taken | None]:
        """Train one client, unless it cannot be in time, and lift its update, unless it must be left out."""
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
        if failed is not None:
            return refused(known, failed), None
        try:
            return self._trained(chunk, sent, dispatch, method, known=known)
        except Exception as error:  # whatever the user's model, data or method raises ends one client, not the actor
            return refused(known, refusal_of(error)), None

    def _trained(
        self, chunk: SentChunk, sent: Sent, dispatch: Dispatch, method: Method, *, known: Record
    ) -> tuple[Record, Taken | None]:
        """Train one client and take its update, or say why not."""
        begin = time.perf_counter()
        if method.traits.chooses:
            probed = self.train_client(chunk, sent.client, dispatch, probe=True)
            dispatch = cast(Choosing, method).choose(dispatch, probed.adapter)
        trained = self.train_client(chunk, sent.client, dispatch)
        payload = method.upload(dispatch, trained.adapter)
        record = replace(
            timed(known, sent.timing, bytes_up=payload.num_bytes),
            bytes_up=payload.num_bytes,
            loss=trained.loss,
            steps=trained.steps,
            importance=math.nan if sent.timing is None else energy(trained.adapter),
            seconds=time.perf_counter() - begin,
        )
        if record.refused is not None:  # late: the server never had it, so nobody has looked into it
            return record, None
        taken = accepted(chunk.updates, method, dispatch, payload, loss=trained.loss, shapes=self._shapes)
        memory = cast(Remembering, method).remember(dispatch, trained.adapter) if method.traits.memory else {}
        taken = unusable(memory) or taken
        if isinstance(taken, Refusal):
            return refused(record, taken), None
        return record, Taken(partial=method.lift(dispatch, taken, float(sent.client.num_examples)), memory=memory)

    def train_all(self, chunks: Sequence[SentChunk]) -> tuple[list[Packet], list[list[Record]]]:
        """Train several chunks; their partials stay apart, since they are folded in the order of all chunks."""
        done = [self.train(chunk) for chunk in chunks]
        return [partial for partial, _ in done], [records for _, records in done]

    def train_client(self, chunk: SentChunk, client: Client, dispatch: Dispatch, *, probe: bool = False) -> Trained:
        """Train one client on its own examples; a ``probe`` is one pass over them, with draws of its own."""
        settings = chunk.training
        purpose = ("probe",) if probe else ()
        train = self._train or train_client
        return train(
            self._host,
            self._data,
            settings.model_copy(update={"steps": None, "epochs": 1.0}) if probe else settings,
            dispatch=dispatch,
            received=received_adapter(dispatch, self._shapes),
            patch=side_by_side(self._patch.of(chunk), frozen_factors(dispatch, self._shapes)),
            patch_scale=chunk.patch_scale,
            client=client.id,
            seed=seed_for(chunk.seed, "round", chunk.number, "client", client.id, *purpose),
        )

    def score(self, adapter: Packet, indices: np.ndarray, batch_size: int) -> Score:
        """Score one shard of the held-out split."""
        torch.set_num_threads(self._threads)
        return score(self._host, self._data, unpack_adapter(adapter), indices, batch_size)

    def answer(
        self, adapter: Packet, shard: TaskShard, batch_size: int, tokenizer: Callable[[], Any] | None
    ) -> TaskScore:
        """Answer one shard of a task; ``tokenizer`` gets that of the base model, for tasks that need it."""
        torch.set_num_threads(self._threads)
        self._host.wear(unpack_adapter(adapter))
        model = self._host.model.get_base_model().eval()  # PEFT's layers lie in it
        if self._tokenizer is None and tokenizer is not None:
            self._tokenizer = tokenizer()
        return answer(model, self._tokenizer, shard, batch_size, pad_token_id=self._host.spec.pad_token_id)

    def _packet(self, given: Any) -> Packet:
        """Return what travels with the chunk itself, or fetch what was stored once for many readers."""
        return given if isinstance(given, Packet) else self._fetch(given)
