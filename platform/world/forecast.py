"""What an experiment will cost, before anything is paid: its first rounds played by clients that train nothing.

World, server, method and wire are those of a real run, so bytes and simulated seconds are theirs: exact where sizes do
not depend on values; an estimate for FLoRIST's downloads, whose ranks follow from spectra, and under TSFA, which weighs
clients by the energy of their updates. In the place of training stands a little noise, since a method may look at what
it is sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedloom.platform.adapter import Adapter
from fedloom.platform.client import Client
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Dispatch
from fedloom.platform.population import chunks_of
from fedloom.platform.preparation import Prepared, global_rank, world_of
from fedloom.platform.received import received_adapter
from fedloom.platform.record import Record
from fedloom.platform.seeds import generator_for, seed_for
from fedloom.platform.sent import SentChunk
from fedloom.platform.server import Server
from fedloom.platform.trainer import Trained
from fedloom.platform.wire import Packet, pack
from fedloom.platform.worker import ClientWorker
from fedloom.platform.world.clock import flop_of, training_tokens
from fedloom.platform.world.ledger import totals

NOISE = 1e-3


class NoiseWorker(ClientWorker):
    """A client actor without a model: its clients add seeded noise to what the dispatch lets them train."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], head_parameters: int) -> None:
        """Take the shapes in place of a model."""
        self._threads = 1
        self._shapes = dict(shapes)
        self._head_parameters = head_parameters
        self._fetch = lambda packet: packet

    def initial_head(self, seed: int) -> Packet:
        """Return a head of the right size."""
        return pack({"all": torch.zeros(self._head_parameters)})

    def train_client(self, chunk: SentChunk, client: Client, dispatch: Dispatch, *, probe: bool = False) -> Trained:
        """Return the received adapter with noise."""
        received = received_adapter(dispatch, self._shapes)
        generator = generator_for(chunk.seed, "forecast", chunk.number, client.id)
        noisy = {
            name: tensor + NOISE * torch.randn(tensor.shape, generator=generator)
            for name, tensor in received.tensors().items()
        }
        return Trained(adapter=Adapter.from_tensors(noisy, received.scale), loss=0.0, steps=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Means over the played rounds; ``sim_s`` is ``None`` without a clock.

    Attributes:
        bytes_down: of all clients of a round.
        bytes_up: likewise.
        flop: likewise, of training.
        sim_s: simulated seconds of a round.
        stragglers: updates of a round that the deadline cuts.
        rounds: how many were played.
        records: every client's part in every played round.
    """

    bytes_down: float
    bytes_up: float
    flop: float
    sim_s: float | None
    stragglers: float
    rounds: int
    records: Sequence[Record]


def forecast(experiment: Experiment, prepared: Prepared, *, rounds: int = 3) -> Forecast:
    """Play the first rounds of an experiment without training."""
    world = world_of(experiment, prepared)
    worker = NoiseWorker(prepared.shapes, prepared.head_parameters)
    server = Server()
    rank = global_rank(experiment, prepared)
    server.begin(experiment, prepared.shapes, rank, worker.initial_head(experiment.seed), "forecast")
    played: list[dict[str, Any]] = []
    everybody: list[Record] = []
    for number in range(1, min(rounds, experiment.rounds) + 1):
        chunks = chunks_of(experiment, world.open(number).tasks)
        records: list[Record] = []
        for chunk in chunks:
            partial, done = worker.train(server.dispatch(chunk))
            server.fold(chunk.index, partial)
            records += done
        server.finish(len(chunks))
        flop = sum(_flop(experiment, prepared, number, record) for record in records)
        played.append({**totals(records), **world.close(records), "flop": flop})
        everybody += records

    def mean(name: str) -> float:
        return float(np.mean([metrics[name] for metrics in played]))

    return Forecast(
        bytes_down=mean("bytes/down"),
        bytes_up=mean("bytes/up"),
        flop=mean("flop"),
        sim_s=mean("sim/round_s") if world.has_clock else None,
        stragglers=mean("stragglers"),
        rounds=len(played),
        records=everybody,
    )


def _flop(experiment: Experiment, prepared: Prepared, number: int, record: Record) -> float:
    seed = seed_for(experiment.seed, "round", number - 1, "client", record.client)
    tokens = training_tokens(prepared.data, experiment.training, record.client, seed)
    flop, flop_per_rank = flop_of(tokens, prepared.base_parameters, prepared.shapes)
    return flop + record.rank * flop_per_rank
