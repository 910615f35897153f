"""Measuring the global model on the held-out split, in shards whose sums do not depend on who takes them."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedloom.platform.adapter import Adapter
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.data.federated import NO_LOSS, FederatedData, collate
from fedloom.platform.experiment import Experiment
from fedloom.platform.seeds import generator_for

BATCHES_PER_SHARD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over held-out predictions: one per example for classification, one per learnt token for causal_lm."""

    loss: float
    correct: int
    count: int


def shards_of(experiment: Experiment, data: FederatedData) -> list[np.ndarray]:
    """Cut the held-out examples into shards, by length, so that batches carry little padding."""
    test = data.test
    limit = experiment.evaluation.max_examples
    if limit is not None and limit < len(test):
        order = torch.randperm(len(test), generator=generator_for(experiment.seed, "evaluation"))
        test = np.sort(test[order[:limit].numpy()])
    lengths = data.offsets[test + 1] - data.offsets[test]
    test = test[np.argsort(lengths, kind="stable")]
    size = BATCHES_PER_SHARD * experiment.evaluation.batch_size
    return [test[start : start + size] for start in range(0, len(test), size)]


def client_shards_of(experiment: Experiment, data: FederatedData) -> dict[str, np.ndarray]:
    """Sample clients, and examples of each, for the spread of the final model over clients.

    The examples are those held out from the clients' training; where nothing is held out, those that they train on.
    """
    limit, most = experiment.evaluation.clients, experiment.evaluation.client_examples
    own = data.held_out or data.clients
    names = [name for name, examples in own.items() if len(examples)]
    if limit < len(names):
        order = torch.randperm(len(names), generator=generator_for(experiment.seed, "evaluation", "clients"))
        names = [names[index] for index in sorted(order[:limit].tolist())]
    return {name: _sampled(own[name], most, experiment.seed, name) for name in names}


def _sampled(examples: np.ndarray, most: int, seed: int, client: str) -> np.ndarray:
    if len(examples) <= most:
        return examples
    order = torch.randperm(len(examples), generator=generator_for(seed, "evaluation", "client", client))
    return np.sort(examples[order[:most].numpy()])


def score(host: AdapterHost, data: FederatedData, adapter: Adapter, indices: np.ndarray, batch_size: int) -> Score:
    """Score one shard with the composed global adapter."""
    host.wear(adapter)
    host.model.eval()
    loss, correct, count = 0.0, 0, 0
    for start in range(0, len(indices), batch_size):
        logits, labels = _predicted(host, collate(data, indices[start : start + batch_size]), data.task)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return Score(loss=loss, correct=correct, count=count)


@torch.no_grad()  # not inference_mode: weights that are gathered in it (ZeRO 3) could not be trained later
def _predicted(host: AdapterHost, batch: dict[str, Tensor], task: str) -> tuple[Tensor, Tensor]:
    """Return logits (predictions, classes or vocabulary) and labels (predictions,) of what is to be predicted."""
    labels = batch.pop("labels").to(host.device)
    logits: Tensor = host.model(**{name: tensor.to(host.device) for name, tensor in batch.items()}).logits.float()
    if task == "causal_lm":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        learnt = labels != NO_LOSS
        return logits[learnt], labels[learnt]
    return logits, labels


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientScore:
    """The final model on one client's own examples; ``num_examples`` counts what was scored."""

    client: str
    profile: str
    rank: int
    num_examples: int
    loss: float
    accuracy: float


def spread(scores: Sequence[ClientScore]) -> dict[str, float]:
    """Return mean, standard deviation (of the population) and worst decile of the clients' accuracies.

    The worst decile is the mean over the tenth of the clients, at least one, whose accuracy is lowest.
    """
    if not scores:
        return {}
    accuracies = np.sort([each.accuracy for each in scores])
    return {
        "clients/accuracy/mean": float(accuracies.mean()),
        "clients/accuracy/std": float(accuracies.std()),
        "clients/accuracy/worst_decile": float(accuracies[: max(1, len(accuracies) // 10)].mean()),
    }


def total(scores: Sequence[Score]) -> dict[str, float]:
    """Return mean loss and accuracy over all shards, added up in their order."""
    count = sum(part.count for part in scores)
    return {
        "eval/loss": sum(part.loss for part in scores) / count,
        "eval/accuracy": sum(part.correct for part in scores) / count,
    }


def clients_csv(scores: Sequence[ClientScore]) -> bytes:
    """Return a table with one row per client: the fields of :class:`ClientScore`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(ClientScore)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(each) for each in scores)
    return text.getvalue().encode()
