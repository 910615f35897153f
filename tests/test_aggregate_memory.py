"""What ``fedloom aggregate`` holds in memory: one adapter for sums, the factors of each for stacks."""

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from rounds import factors as drawn_factors

from fedloom.platform.adapter import Adapter, Template
from fedloom.platform.merging import Contribution, merge_round
from fedloom.platform.registry import build_method


def live_bytes() -> int:
    """Return the memory of all tensors that there are, storages once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(name: str, count: int) -> list[int]:
    """Return the memory of all new tensors at the moments before each of ``count`` adapters is read."""
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    seen = []

    def read(index: int) -> Callable[[], Adapter]:
        def values() -> Adapter:
            seen.append(live_bytes())
            return Adapter(factors={"module": drawn_factors(300, 4, 400, seed=index)}, head={}, scale=1.0)

        return values

    def all_of_them() -> Iterator[Contribution]:
        for index in range(count):
            yield Contribution(name=str(index), num_examples=1, ranks={"module": 4}, read=read(index))

    template = Template(shapes={"module": (300, 400)}, head={}, rank=4, scale=1.0)
    try:
        merge_round(build_method(name, {}), template, all_of_them())
    finally:
        gc.unfreeze()
    return seen


@pytest.mark.parametrize("name", ["fedit", "zero_padding", "hetlora", "per_index"])
def test_sums_hold_one_adapter_however_many_come(name: str):
    """After the second adapter, the memory before each further one is the same: none of those before it is alive."""
    seen = measured(name, 8)

    assert len(set(seen[1:])) == 1


def test_stacks_grow_by_the_factors_of_each():
    """So that the test above would see adapters that are kept."""
    seen = measured("flora", 8)
    steps = {after - before for before, after in pairwise(seen)}

    assert steps == {8 * 4 * (300 + 400)}
