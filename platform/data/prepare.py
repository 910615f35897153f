"""From an experiment to federated data: read, map, split, sample, partition, tokenise."""

from typing import TYPE_CHECKING

import numpy as np

from fedloom.platform.data.examples import map_examples
from fedloom.platform.data.federated import FederatedData, Int64, fingerprint_of
from fedloom.platform.data.partition import hold_out, partition_examples
from fedloom.platform.data.source import load_rows
from fedloom.platform.data.tokens import check_length, first_without_loss, pad_token_id, tokenize
from fedloom.platform.errors import DataError
from fedloom.platform.experiment import Experiment
from fedloom.platform.seeds import generator_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_data(experiment: Experiment, tokenizer: "PreTrainedTokenizerBase") -> FederatedData:
    """Read, map, split, sample, partition and tokenise the data of an experiment.

    Only the examples that some client holds and the test examples are tokenised and kept: first the former, then the
    latter, both in the order of the source.

    Args:
        experiment: its `data` and `partition` sections and its seed decide the result.
        tokenizer: a fast tokenizer; slow ones work and take their time.

    Returns:
        The data; equal experiments, sources and tokenizers give equal fingerprints.

    Raises:
        DataError: for everything that is wrong with the source, its columns, its splits or the partition.
    """
    data = experiment.data
    check_length(data, tokenizer)
    padding = pad_token_id(tokenizer)
    rows = load_rows(data)
    examples = map_examples(rows, data, experiment.partition)
    train = _sample(examples.num_train, data.max_train_examples, experiment.seed)
    parts = partition_examples(
        experiment.partition,
        num_examples=len(train),
        labels=examples.labels[train] if len(examples.labels) else examples.labels,
        clients=[examples.clients[i] for i in train] if examples.clients else [],
        seed=experiment.seed,
    )
    kept = np.sort(np.concatenate(list(parts.values())))
    used = np.concatenate([train[kept], np.arange(examples.num_train, len(examples.rows))])
    tokens = tokenize(data, tokenizer, [examples.prompts[i] for i in used], [examples.texts[i] for i in used])
    empty = first_without_loss(tokens, data.task)
    if empty is not None:
        place = rows.place(int(examples.rows[used[empty]]))
        raise DataError(f"key data.source: {place} has no token to learn from; its text is empty. Remove such rows.")
    classify = data.task == "classification"
    own = {name: np.searchsorted(kept, part) for name, part in parts.items()}
    clients, held_out = hold_out(experiment.partition, own, experiment.seed)
    return _with_fingerprint(
        FederatedData(
            task=data.task,
            input_ids=tokens.input_ids,
            offsets=tokens.offsets,
            labels=examples.labels[used] if classify else tokens.num_silent,
            clients=clients,
            test=np.arange(len(kept), len(used)),
            label_names=examples.label_names if classify else (),
            pad_token_id=padding,
            fingerprint="",
            held_out=held_out,
        )
    )


def majority_accuracy(data: FederatedData) -> float | None:
    """Share of the test examples that bear the most common training label; None for causal_lm."""
    if data.task != "classification":
        return None
    train = np.concatenate(list(data.clients.values()))
    most_common = np.bincount(data.labels[train]).argmax()
    return float(np.mean(data.labels[data.test] == most_common))


def _sample(num_train: int, limit: int | None, seed: int) -> Int64:
    import torch

    if limit is None or limit >= num_train:
        return np.arange(num_train)
    chosen = torch.randperm(num_train, generator=generator_for(seed, "data", "sample"))[:limit]
    return np.sort(chosen.numpy())


def _with_fingerprint(data: FederatedData) -> FederatedData:
    arrays, meta = data.arrays()
    return FederatedData.from_arrays(arrays, {**meta, "fingerprint": fingerprint_of(arrays, meta)})
