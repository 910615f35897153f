"""Spread training examples over clients, with the partitioners of `flwr-datasets`.

Why those: docs/decisions/0002-partitioners.md. They see two columns of integers, the position of an example and the
number of its label or client, so that no type of a user's column can surprise them. All draws come from the seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedloom.platform.data.federated import Int64
from fedloom.platform.data.quiet import quiet_partitioners
from fedloom.platform.errors import DataError
from fedloom.platform.experiment_data import PartitionSection
from fedloom.platform.seeds import generator_for, seed_for

DIRICHLET_ATTEMPTS = 50
"""Of eleven draws each: 20 clients at alpha 0.1 over two labels, as in the papers, need about ten."""


def partition_examples(
    section: PartitionSection, *, num_examples: int, labels: Int64, clients: Sequence[str | int], seed: int
) -> dict[str, Int64]:
    """Give every training example to one client.

    `natural` keeps the clients that are large enough (and of these the `num_clients` largest, the first in order where
    sizes tie); all other kinds give all examples away.

    Args:
        section: which kind, and its options.
        num_examples: n, the number of training examples.
        labels: (n,) class of every example, for `dirichlet` and `shards`.
        clients: (n,) client of every example, for `natural`.
        seed: the experiment's seed.

    Returns:
        Sorted positions in range(n) by client id: natural ids as they are, in order; else `client-000` and so on.

    Raises:
        DataError: if there are too few examples or clients.
    """
    if section.kind == "natural":
        return _natural(section, clients)
    count = section.num_clients or 0
    if num_examples < count * section.min_examples:
        raise DataError(
            f"key partition.num_clients: {count} clients with at least {section.min_examples} examples each need "
            f"{count * section.min_examples} training examples, there are {num_examples}. "
            "Lower partition.num_clients or partition.min_examples."
        )
    order = _permutation(num_examples, seed, "order")
    draw = seed_for(seed, "partition") % 2**32
    if section.kind == "iid":
        parts = _iid(order, count)
    elif section.kind == "dirichlet":
        parts = _dirichlet(section, order, labels, count, seed)
    elif section.kind == "shards":
        parts = _shards(section, order[np.argsort(labels[order], kind="stable")], count, draw)
    else:
        parts = _quantity(section, order, count)
    _refuse_small(section, parts)
    width = max(3, len(str(count - 1)))
    return {f"client-{i:0{width}d}": part for i, part in enumerate(parts)}


def hold_out(
    section: PartitionSection, parts: Mapping[str, Int64], seed: int
) -> tuple[dict[str, Int64], dict[str, Int64]]:
    """Take ``client_test_fraction`` of each client's examples out of its training, by a draw of its own.

    The share is rounded; a client of two examples or more keeps at least one and has at least one held out, a client
    of one keeps it.

    Args:
        section: its ``client_test_fraction``.
        parts: sorted indices by client id.
        seed: the experiment's seed.

    Returns:
        What clients train on and what is held out, sorted, both by client id; with a fraction of 0 the latter is empty.

    Raises:
        DataError: no client has two examples.
    """
    fraction = section.client_test_fraction
    if fraction == 0:
        return dict(parts), {}
    if all(len(part) < 2 for part in parts.values()):
        raise DataError(
            f"key partition.client_test_fraction: {fraction:g} of each client's examples are to be held out, but none "
            f"of the {len(parts)} clients has more than one. Lower partition.num_clients, or set it to 0."
        )
    clients, held_out = {}, {}
    for name, part in parts.items():
        count = min(len(part) - 1, max(1, round(fraction * len(part))))
        order = _permutation(len(part), seed, "held out", name)
        held_out[name], clients[name] = np.sort(part[order[:count]]), np.sort(part[order[count:]])
    return clients, held_out


def _permutation(count: int, seed: int, *name: str) -> Int64:
    import torch

    return torch.randperm(count, generator=generator_for(seed, "partition", *name)).numpy()


def _natural(section: PartitionSection, clients: Sequence[str | int]) -> dict[str, Int64]:
    ids = sorted(set(clients))  # a column is of one type
    number = {name: i for i, name in enumerate(ids)}
    keys = np.array([number[name] for name in clients], np.int64)
    parts = _run("NaturalIdPartitioner", np.arange(len(keys)), keys, partition_by="key")
    large = [i for i, part in enumerate(parts) if len(part) >= section.min_examples]
    if len(large) < (section.num_clients or 1):
        raise DataError(
            f"key partition.num_clients: {section.num_clients or 1} clients are asked for, but only {len(large)} of "
            f"{len(ids)} have at least {section.min_examples} training examples. "
            "Lower partition.num_clients or partition.min_examples."
        )
    largest = sorted(large, key=lambda i: (-len(parts[i]), i))[: section.num_clients]
    return {str(ids[i]): parts[i] for i in sorted(largest)}


def _iid(order: Int64, count: int) -> list[Int64]:
    """Equal sizes, give or take one."""
    return _run("IidPartitioner", order, np.zeros_like(order), num_partitions=count)


def _dirichlet(section: PartitionSection, order: Int64, labels: Int64, count: int, seed: int) -> list[Int64]:
    """Every label is spread by its own draw of Dirichlet(alpha); sizes are left as they fall (no self-balancing)."""
    for attempt in range(DIRICHLET_ATTEMPTS):
        try:
            return _run(
                "DirichletPartitioner",
                order,
                labels[order],
                num_partitions=count,
                partition_by="key",
                alpha=section.alpha,
                min_partition_size=section.min_examples,
                self_balancing=False,
                seed=seed_for(seed, "partition", *([attempt] if attempt else [])) % 2**32,
            )
        except ValueError:  # eleven draws in a row left some client too small
            continue
    raise DataError(
        f"key partition.alpha: dirichlet with alpha {section.alpha} over {len(np.unique(labels))} labels did not "
        f"give each of {count} clients {section.min_examples} of the {len(labels)} training examples. "
        "Raise partition.alpha, or lower partition.num_clients or partition.min_examples."
    )


def _shards(section: PartitionSection, by_label: Int64, count: int, draw: int) -> list[Int64]:
    """Cut the label-sorted examples into shards of equal size, give or take one, and deal them out at random.

    The library drops what does not fill a shard. So shards are cut here, and short ones filled up with -1, which is
    taken away again when they are dealt.
    """
    num_shards = count * section.shards_per_client
    if len(by_label) < num_shards:
        raise DataError(
            f"key partition.shards_per_client: {count} clients with {section.shards_per_client} shards each need "
            f"{num_shards} training examples, there are {len(by_label)}. "
            "Lower partition.num_clients or partition.shards_per_client."
        )
    size = -(-len(by_label) // num_shards)
    filled = [np.pad(s, (0, size - len(s)), constant_values=-1) for s in np.array_split(by_label, num_shards)]
    dealt = _run(
        "ShardPartitioner",
        np.concatenate(filled),
        np.arange(num_shards * size),
        num_partitions=count,
        partition_by="key",
        num_shards_per_partition=section.shards_per_client,
        shard_size=size,
        seed=draw,
    )
    return [part[part >= 0] for part in dealt]


def _quantity(section: PartitionSection, order: Int64, count: int) -> list[Int64]:
    """Client i gets a share of (i + 1) ** exponent; what rounding leaves goes to the largest fractions."""
    weights = (np.arange(1, count + 1) / count) ** section.exponent
    ideal = len(order) * weights / weights.sum()
    sizes = np.floor(ideal).astype(np.int64)
    sizes[np.argsort(sizes - ideal, kind="stable")[: len(order) - sizes.sum()]] += 1
    _refuse_small(section, [order[:size] for size in sizes])
    return _run("SizePartitioner", order, np.zeros_like(order), partition_sizes=sizes.tolist())


def _run(partitioner: str, rows: Int64, keys: Int64, **options: Any) -> list[Int64]:
    """Let a partitioner of the library divide `rows` by `keys`, and see that it lost and doubled none."""
    with quiet_partitioners():
        import datasets
        from flwr_datasets import partitioner as library

        chosen = getattr(library, partitioner)(**options)
        chosen.dataset = datasets.Dataset.from_dict({"row": rows, "key": keys})
        loaded = [chosen.load_partition(i) for i in range(chosen.num_partitions)]
        parts = [np.sort(np.asarray(part["row"][:], np.int64)) for part in loaded]
    if not np.array_equal(np.sort(np.concatenate(parts)), np.sort(rows)):
        raise DataError(f"{partitioner} of flwr-datasets lost or doubled examples; please report it.")
    return parts


def _refuse_small(section: PartitionSection, parts: Sequence[Int64]) -> None:
    smallest = min(range(len(parts)), key=lambda i: len(parts[i]))
    if len(parts[smallest]) < section.min_examples:
        raise DataError(
            f"key partition.min_examples: {section.kind} leaves client {smallest} of {len(parts)} with "
            f"{len(parts[smallest])} training examples, fewer than {section.min_examples}. "
            "Lower partition.num_clients or partition.min_examples"
            + (" or partition.exponent." if section.kind == "quantity" else ".")
        )
