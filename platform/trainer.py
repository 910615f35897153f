"""Local training of one client: what the dispatch says, on the client's own examples."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import checkpointing
from fedloom.platform.data.federated import NO_LOSS, FederatedData, collate
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.method import Dispatch
from fedloom.platform.penalties import PENALTIES
from fedloom.platform.received import ties_of
from fedloom.platform.seeds import generator_for, seed_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What local training gives: the adapter, the mean loss over the steps, and their number."""

    adapter: Adapter
    loss: float
    steps: int


def train_client(
    host: AdapterHost,
    data: FederatedData,
    settings: TrainingSection,
    *,
    dispatch: Dispatch,
    received: Adapter,
    patch: Mapping[str, Factors] | None,
    patch_scale: float,
    client: str,
    seed: int,
) -> Trained:
    """Train one client and return its adapter; bits depend on the arguments alone.

    The optimiser is new in every round. Batches and dropout come from ``seed``; the process's own generators are
    left as they were.
    """
    ties = ties_of(dispatch, host.shapes)
    host.wear(received, patch=patch, patch_scale=patch_scale, trainable=dispatch.trainable, ties=ties)
    optimizer = optimizer_of(host, settings)
    schedule = schedule_of(optimizer, settings, num_steps(data.clients[client], settings))
    total = torch.zeros((), device=host.device)
    steps = 0
    saving = checkpointing(host.model) if settings.gradient_checkpointing else contextlib.nullcontext()
    with seeded_dropout(host.device, seed), saving:
        host.model.train()
        for indices in batches(data.clients[client], settings, seed):
            loss = _step(host, optimizer, collate(data, indices), dispatch, settings)
            total += loss
            steps += 1
            schedule.step()
        host.model.eval()
    return Trained(adapter=host.worn(received.scale), loss=float(total) / max(1, steps), steps=steps)


def batches(examples: np.ndarray, settings: TrainingSection, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of each step: shuffled passes over the client's examples, cut to steps or epochs.

    Without ``steps`` and ``epochs`` a round is one pass. The last batch of a pass may be short.
    """
    generator = generator_for(seed, "batches")
    size = min(settings.batch_size, len(examples))
    per_pass = math.ceil(len(examples) / size)
    left = num_steps(examples, settings)
    while left > 0:
        order = examples[torch.randperm(len(examples), generator=generator).numpy()]
        for start in range(0, min(per_pass, left) * size, size):
            yield order[start : start + size]
        left -= per_pass


def num_steps(examples: np.ndarray, settings: TrainingSection) -> int:
    """Return the steps of a client in one round."""
    if settings.steps is not None:
        return settings.steps
    per_pass = math.ceil(len(examples) / min(settings.batch_size, len(examples)))
    return max(1, round(per_pass * (settings.epochs or 1.0)))


def _step(
    host: AdapterHost,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    dispatch: Dispatch,
    settings: TrainingSection,
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=host.device)
    penalty = dispatch.penalty
    for part, share in _parts(batch, settings.micro_batch_size):
        loss: Tensor = host.model(**on_device(part, host.device)).loss
        objective = share * loss
        if penalty is not None:
            objective = objective + penalty.weight * PENALTIES[penalty.name](host.pairs(), **penalty.options)
            penalty = None  # once a step
        objective.backward()  # type: ignore[no-untyped-call]
        total += share * loss.detach().float()
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(host.factor_parameters() + host.head_parameters(), settings.max_grad_norm)
    optimizer.step()
    return total


def _parts(batch: dict[str, Tensor], size: int | None) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Yield a batch in parts, each with its share of what the batch's mean loss is over: classes, or learnt tokens."""
    labels = batch["labels"]
    if size is None or len(labels) <= size:
        yield batch, 1.0
        return
    terms = terms_of(labels)
    for start in range(0, len(labels), size):
        share = float(terms[start : start + size].sum() / terms.sum())
        if share > 0:
            yield {name: tensor[start : start + size] for name, tensor in batch.items()}, share


def parts_of_rank(
    batch: dict[str, Tensor], rank: int, world: int, size: int | None
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Yield the parts of a batch that are a process's, each with its share of what the batch's mean loss is over.

    All processes have equally many parts, since they work together in each: one whose examples are used up goes
    through an example that counts nothing.
    """
    terms = terms_of(batch["labels"])
    n = len(terms)
    start, end = rank * n // world, (rank + 1) * n // world
    widest = -(-n // world)
    size = min(size or widest, widest)
    for first in range(start, start + size * math.ceil(widest / size), size):
        rows = slice(first, min(first + size, end))
        share = float(terms[rows].sum() / terms.sum())
        if first >= end or share == 0:
            rows, share = slice(int(terms.argmax()), int(terms.argmax()) + 1), 0.0
        yield {name: tensor[rows] for name, tensor in batch.items()}, share


def terms_of(labels: Tensor) -> Tensor:
    """Return what each example adds to the number of terms that the batch's mean loss is over, (n,)."""
    return (labels[:, 1:] != NO_LOSS).sum(dim=1) if labels.dim() > 1 else torch.ones_like(labels)


def optimizer_of(host: AdapterHost, settings: TrainingSection) -> torch.optim.Optimizer:
    """Return a new optimiser of what the host's adapter and head have to train."""
    groups = [
        {"params": host.factor_parameters(), "lr": settings.learning_rate},
        {"params": host.head_parameters(), "lr": settings.head_learning_rate or settings.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def schedule_of(
    optimizer: torch.optim.Optimizer, settings: TrainingSection, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rates by step t of T, as factors: 1, or 1 - t / T as in Transformers' ``linear``."""
    linear = settings.schedule == "linear"
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if linear else 1.0)


def on_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Return a batch on a device; the copy does not wait."""
    return batch if device == "cpu" else {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class seeded_dropout:  # noqa: N801 - reads as the context manager that it is
    """Seed the generators that dropout uses, and put them back afterwards."""

    def __init__(self, device: str, seed: int) -> None:
        self._fork = torch.random.fork_rng(devices=[] if device == "cpu" else [torch.device(device)])
        self._seed = seed_for(seed, "dropout")

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fork.__exit__(kind, error, trace)
