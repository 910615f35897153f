"""Pilots for the choice of the rank: a few rounds at one rank, from which the clients' adapters are kept.

RECONSTRUCTED with the rest of TSFA's first stage, see :mod:`fedloom.tuning.structural_rank`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.methods.algebra import stacked_svd
from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.client import Budget, Client
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import Dispatch
from fedloom.platform.population import Task, chunks_of, pools_of, threads_of
from fedloom.platform.preparation import Prepared, global_rank
from fedloom.platform.seeds import generator_for
from fedloom.platform.sent import SentChunk
from fedloom.platform.server import Server
from fedloom.platform.trainer import Trained
from fedloom.platform.worker import ClientWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """One client's trained adapter and its share of the cohort's examples."""

    adapter: Adapter
    weight: float


class KeepingWorker(ClientWorker):
    """A client's machine that keeps what its clients have trained since it was last asked."""

    kept: list[tuple[Adapter, int]]

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Load the base model."""
        super().__init__(*args, **settings)
        self.kept = []

    def train_client(self, chunk: SentChunk, client: Client, dispatch: Dispatch, *, probe: bool = False) -> Trained:
        """Train one client and keep its adapter, unless it is to be thrown away."""
        trained = super().train_client(chunk, client, dispatch, probe=probe)
        if not probe:
            self.kept.append((trained.adapter, client.num_examples))
        return trained


def at_rank(experiment: Experiment, rank: int) -> Experiment:
    """Return the experiment with one structural rank for the server and every client in every module."""
    profiles = tuple(
        profile.model_copy(update={"rank": rank, "rank_pattern": {}}) for profile in experiment.population.profiles
    )
    return experiment.model_copy(
        update={
            "adapter": experiment.adapter.model_copy(update={"rank": rank}),
            "population": experiment.population.model_copy(update={"profiles": profiles}),
        }
    )


def pilot(prepared: Prepared, experiment: Experiment, rank: int, *, rounds: int) -> list[Local]:
    """Train ``rounds`` rounds in this process, everything sent, and return the last cohort's adapters.

    Cohorts are drawn from a seed of the pilot's own, alike for every rank; no clock runs.

    Args:
        prepared: data, clients and shapes.
        experiment: the training and the method.
        rank: of the server and every client.
        rounds: how many.
    """
    described = at_rank(experiment, rank)
    worker = _worker(prepared, described)
    server = Server()
    server.begin(
        described,
        prepared.shapes,
        global_rank(described, prepared),
        worker.initial_head(described.seed),
        f"pilot-{rank}",
    )
    size = min(described.cohort.size, len(prepared.clients))
    for number in range(rounds):
        worker.kept = []
        order = torch.randperm(len(prepared.clients), generator=generator_for(described.seed, "pilot", number))
        cohort = [prepared.clients[index] for index in order[:size].tolist()]
        clients = [Client(id=c.id, profile=c.profile, rank=rank, num_examples=c.num_examples) for c in cohort]
        chunks = chunks_of(described, [Task(client=client, budget=Budget(rank=rank)) for client in clients])
        for chunk in chunks:
            partial, _ = worker.train(server.dispatch(chunk))
            server.fold(chunk.index, partial)
        server.finish(len(chunks))
    total = sum(examples for _, examples in worker.kept)
    return [Local(adapter=adapter, weight=examples / total) for adapter, examples in worker.kept]


def _worker(prepared: Prepared, experiment: Experiment) -> KeepingWorker:
    pool = pools_of(experiment)[0]
    device = "cuda" if dict(pool)["num_gpus"] > 0 and torch.cuda.is_available() else "cpu"
    return KeepingWorker(prepared.spec, prepared.data, device=device, threads=threads_of(pool))


def mean_spectrum(cohort: Sequence[Local], rank: int) -> Tensor:
    """Return the weighted mean energy of the local products by direction: sigma_i^2 summed over modules, (rank,)."""
    energies = torch.zeros(rank, dtype=torch.float64)
    for local in cohort:
        for pair in local.adapter.factors.values():
            squared = stacked_svd(pair.B.double(), pair.A.double()).sigma.square()
            energies[: len(squared)] += local.weight * squared
    return energies


def relative_covariance(cohort: Sequence[Local]) -> float:
    """Return ||sum_k w_k B_k A_k - B A||_F^2 / ||sum_k w_k B_k A_k||_F^2, B and A the means, summed over modules.

    It is the error of averaging the factors apart (0 if all products are zero). Norms are taken from Gram matrices of
    the stacked factors in float64, so that no product of a module's size is formed.
    """
    error = total = 0.0
    for module in cohort[0].adapter.factors:
        pairs = [(local.adapter.factors[module], local.weight) for local in cohort]
        B = torch.cat([pair.B.double() for pair, _ in pairs], dim=1)
        A = torch.cat([weight * pair.A.double() for pair, weight in pairs], dim=0)
        mean = _mean([pair for pair, _ in pairs], [weight for _, weight in pairs])
        total += _squared_norm(B, A)
        error += _squared_norm(torch.cat([B, -mean.B], dim=1), torch.cat([A, mean.A], dim=0))
    return error / total if total > 0 else 0.0


def _mean(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    B = torch.stack([weight * pair.B.double() for pair, weight in zip(pairs, weights, strict=True)]).sum(dim=0)
    A = torch.stack([weight * pair.A.double() for pair, weight in zip(pairs, weights, strict=True)]).sum(dim=0)
    return Factors(B=B, A=A)


def _squared_norm(B: Tensor, A: Tensor) -> float:
    """Return ||B A||_F^2 = tr((B^T B)(A A^T)), never below 0."""
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
