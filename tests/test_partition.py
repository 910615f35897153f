"""What must hold for every way to spread examples over clients. Run: pytest tests/test_partition.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.platform.data.partition import hold_out, partition_examples
from fedloom.platform.errors import DataError
from fedloom.platform.experiment_data import PartitionSection

NUM_EXAMPLES = 603  # no multiple of anything below
LABELS = np.random.default_rng(0).integers(0, 4, NUM_EXAMPLES)
WRITERS = [f"writer {i % 7}" if i % 3 else f"writer {i % 5}" for i in range(NUM_EXAMPLES)]
KINDS = ["natural", "iid", "dirichlet", "shards", "quantity"]
DRAWN = KINDS[1:]


def section(kind: str, **options) -> PartitionSection:
    return PartitionSection(kind=kind, **({} if kind == "natural" else {"num_clients": 12}) | options)


def spread(partition: PartitionSection, *, seed=0, labels=LABELS, clients=WRITERS) -> dict[str, np.ndarray]:
    return partition_examples(partition, num_examples=len(labels), labels=labels, clients=clients, seed=seed)


def sizes(parts: dict[str, np.ndarray]) -> list[int]:
    return [len(part) for part in parts.values()]


def skew(parts: dict[str, np.ndarray]) -> float:
    """Mean over clients of the share of their most common label, between 1/4 and 1."""
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts.values()]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_has_exactly_one_client(kind):
    """Partitions are disjoint and complete, sorted, and of the type that crosses the wire."""
    parts = spread(section(kind))

    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(NUM_EXAMPLES))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts.values())


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["iid", "shards", "quantity"]), data=st.data())
def test_no_number_of_examples_leaves_a_remainder(kind, data):
    """Whatever does not divide evenly still goes to somebody."""
    count = data.draw(st.integers(1, 9), label="num_clients")
    size = data.draw(st.integers(count * count * 2, 200), label="num_examples")

    parts = spread(section(kind, num_clients=count), labels=np.arange(size) % 3, clients=[])

    assert len(parts) == count
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda counts: max(counts) > 1),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_held_out_examples_are_the_clients_own_and_not_among_those_it_trains_on(counts, fraction, seed):
    """Nothing is lost or doubled; a client of two or more has both kinds, a client of one trains on it."""
    ends = np.cumsum(counts)
    parts = {f"c{i}": np.arange(end - count, end) for i, (end, count) in enumerate(zip(ends, counts, strict=True))}

    clients, held_out = hold_out(section("iid", client_test_fraction=fraction), parts, seed)

    assert list(clients) == list(held_out) == list(parts)
    for name, part in parts.items():
        np.testing.assert_array_equal(np.sort(np.concatenate([clients[name], held_out[name]])), part)
        assert (np.diff(clients[name]) > 0).all()
        assert (np.diff(held_out[name]) > 0).all()
        assert len(clients[name]) >= 1
        assert len(held_out[name]) >= (len(part) > 1)
        assert abs(len(held_out[name]) - fraction * len(part)) <= 1


def test_the_draw_of_held_out_examples_has_a_seed_and_a_name_of_its_own():
    """A client's held-out examples depend on the seed and on the client, not on who else there is."""
    half = section("iid", client_test_fraction=0.5)
    parts = {"a": np.arange(40), "b": np.arange(40, 80)}
    _, held_out = hold_out(half, parts, 0)

    np.testing.assert_array_equal(hold_out(half, {"b": parts["b"]}, 0)[1]["b"], held_out["b"])
    assert not np.array_equal(held_out["a"], held_out["b"] - 40)
    assert not np.array_equal(hold_out(half, parts, 1)[1]["a"], held_out["a"])


def test_a_fraction_of_which_nobody_can_give_is_refused():
    parts = {"a": np.arange(1), "b": np.arange(1, 2)}

    with pytest.raises(
        DataError, match=r"partition\.client_test_fraction: 0\.2 .* none of the 2 clients has more than"
    ):
        hold_out(section("iid", client_test_fraction=0.2), parts, 0)
    assert hold_out(section("iid"), parts, 0)[1] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_no_global_generator_does(kind):
    """Same seed, same clients; and a partition neither reads nor moves the global generators."""
    first = spread(section(kind), seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        of_torch, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
        second = spread(section(kind), seed=5)
        assert torch.equal(of_torch, torch.get_rng_state())
        np.testing.assert_array_equal(of_numpy, np.random.get_state()[1])

    assert list(first) == list(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("kind", DRAWN)
def test_another_seed_gives_another_partition(kind):
    """Only the natural partition has nothing to draw."""
    first, second = spread(section(kind), seed=0), spread(section(kind), seed=1)

    assert any(not np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_clients_have_numbers_of_equal_width(kind):
    """So that their alphabetical order is the order of their numbers."""
    assert list(spread(section(kind))) == [f"client-{i:03d}" for i in range(12)]


def test_numbers_grow_with_the_number_of_clients():
    """A thousand and one clients need four digits."""
    parts = spread(section("iid", num_clients=1001), labels=np.zeros(1001, np.int64), clients=[])

    assert [min(parts), max(parts)] == ["client-0000", "client-1000"]


def test_natural_clients_are_the_values_of_the_column():
    """Every client holds the rows that bear its name, and all of them."""
    parts = spread(section("natural"))

    assert list(parts) == [f"writer {i}" for i in range(7)]
    for name, part in parts.items():
        assert [i for i, writer in enumerate(WRITERS) if writer == name] == part.tolist()


def test_natural_clients_named_by_integers_keep_their_order():
    """Client 10 comes after client 9, and ids are strings."""
    parts = spread(section("natural"), clients=[i % 11 for i in range(NUM_EXAMPLES)])

    assert list(parts) == [str(i) for i in range(11)]


def test_natural_keeps_the_largest_clients():
    """`num_clients` takes by size, and by order where sizes tie; the order of the clients stays."""
    clients = ["d"] * 3 + ["c"] * 5 + ["b"] * 3 + ["a"] * 1

    parts = spread(section("natural", num_clients=2), labels=np.zeros(12, np.int64), clients=clients)

    assert {name: part.tolist() for name, part in parts.items()} == {"b": [8, 9, 10], "c": [3, 4, 5, 6, 7]}
    assert list(parts) == ["b", "c"]


def test_natural_leaves_out_clients_below_min_examples():
    """They cannot be given what others wrote."""
    clients = ["d"] * 3 + ["c"] * 5 + ["b"] * 2

    parts = spread(section("natural", min_examples=3), labels=np.zeros(10, np.int64), clients=clients)

    assert list(parts) == ["c", "d"]


def test_iid_sizes_differ_by_at_most_one():
    """603 examples over 12 clients: 50 or 51 each."""
    assert set(sizes(spread(section("iid")))) == {50, 51}


def test_iid_clients_hold_no_run_of_the_source():
    """The source may be sorted, so the rows are shuffled before they are dealt."""
    assert all((np.diff(part) > 1).any() for part in spread(section("iid")).values())


def test_a_smaller_alpha_is_more_skewed():
    """Dirichlet's concentration: from nearly one label a client to nearly the mixture of all, for several seeds."""
    for seed in range(3):
        measured = [skew(spread(section("dirichlet", alpha=alpha), seed=seed)) for alpha in (0.1, 1.0, 100.0)]

        assert measured == sorted(measured, reverse=True)
        assert measured[0] > 0.6 > 0.4 > measured[2]


def test_dirichlet_gives_every_client_min_examples():
    """It draws again until no client is too small."""
    assert min(sizes(spread(section("dirichlet", alpha=1.0, min_examples=15)))) >= 15


def test_dirichlet_draws_as_long_as_skewed_clients_over_two_labels_need():
    """20 clients at alpha 0.1, as published: eleven draws often leave somebody without examples."""
    labels = np.arange(3000) % 2
    for seed in range(3):
        parts = spread(section("dirichlet", num_clients=20, alpha=0.1), seed=seed, labels=labels, clients=[])
        assert min(sizes(parts)) >= 1


def test_shards_hold_few_labels():
    """With one shard a client and as many clients as labels of equal size, each client holds a single label."""
    labels = np.arange(80) % 4

    parts = spread(section("shards", num_clients=4, shards_per_client=1), labels=labels, clients=[])

    assert [[i] * 20 for i in range(4)] == sorted(labels[part].tolist() for part in parts.values())


@pytest.mark.parametrize("shards_per_client", [1, 2, 5])
def test_shards_are_of_equal_size(shards_per_client):
    """Give or take one example a shard, which the library itself would drop."""
    measured = sizes(spread(section("shards", shards_per_client=shards_per_client)))

    assert max(measured) - min(measured) <= shards_per_client


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_quantity_follows_the_power_law(exponent):
    """Client i's size is n (i + 1) ** exponent / sum, rounded up or down."""
    shares = np.arange(1, 13) ** exponent
    ideal = NUM_EXAMPLES * shares / shares.sum()

    assert (np.abs(np.array(sizes(spread(section("quantity", exponent=exponent)))) - ideal) < 1).all()


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            section("iid", num_clients=604),
            "key partition.num_clients: 604 clients with at least 1 examples each need 604 training examples, there "
            "are 603. Lower partition.num_clients or partition.min_examples.",
        ),
        (
            section("dirichlet", alpha=0.001),
            "key partition.alpha: dirichlet with alpha 0.001 over 4 labels did not give each of 12 clients 1 of the "
            "603 training examples. Raise partition.alpha, or lower partition.num_clients or partition.min_examples.",
        ),
        (
            section("shards", shards_per_client=60),
            "key partition.shards_per_client: 12 clients with 60 shards each need 720 training examples, there are "
            "603. Lower partition.num_clients or partition.shards_per_client.",
        ),
        (
            section("quantity", min_examples=20),
            "key partition.min_examples: quantity leaves client 0 of 12 with 8 training examples, fewer than 20. "
            "Lower partition.num_clients or partition.min_examples or partition.exponent.",
        ),
        (
            section("natural", num_clients=8),
            "key partition.num_clients: 8 clients are asked for, but only 7 of 7 have at least 1 training examples. "
            "Lower partition.num_clients or partition.min_examples.",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, PartitionSection) else "",
)
def test_what_cannot_be_divided_is_refused_with_what_to_change(partition, message):
    with pytest.raises(DataError) as caught:
        spread(partition)

    assert str(caught.value) == message
