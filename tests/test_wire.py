"""Tensors cross process borders in one flat buffer, bit for bit, and never as code."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.method import Dispatch, Payload, Penalty
from fedloom.platform.partial import Partial
from fedloom.platform.wire import (
    ALIGNMENT_BYTES,
    Packet,
    dispatch_from,
    dispatch_header,
    pack,
    pack_adapter,
    pack_partial,
    pack_payload,
    unpack,
    unpack_adapter,
    unpack_partial,
    unpack_payload,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_packing_and_unpacking_gives_the_same_bits(specs):
    """Any dtypes and shapes, empty ones included."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(specs)
    }

    result = unpack(pack(tensors))

    assert list(tensors) == list(result)
    for name, tensor in tensors.items():
        assert tensor.dtype == result[name].dtype
        assert tensor.shape == result[name].shape
        assert torch.equal(tensor, result[name])


def test_tensors_start_at_cache_lines():
    packet = pack({"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(1)})

    assert [0, ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES] == [start for _, _, _, start in packet.layout]


def test_unpacking_is_a_view_and_accepts_shared_read_only_memory(recwarn):
    """Ray hands buffers out read-only; reading them takes no copy and no warning."""
    packet = pack({"a": torch.arange(4.0)})
    packet.buffer.setflags(write=False)

    view = unpack(packet)["a"]

    assert packet.buffer.__array_interface__["data"][0] == view.data_ptr()
    assert not recwarn.list


def test_an_unknown_dtype_is_refused_by_name():
    packet = Packet(layout=(("a", "complex128", (1,), 0),), meta={}, buffer=np.zeros(64, dtype=np.uint8))

    with pytest.raises(AdapterError, match="'a' has dtype complex128"):
        unpack(packet)


def test_a_dispatch_survives_the_way():
    dispatch = Dispatch(
        payload=Payload(
            tensors={"q.B": torch.randn(3, 2), "q.A": torch.randn(2, 5), "head.score.weight": torch.randn(2, 2)},
            masks={"q": torch.tensor([True, False])},
            seeds={"sketch": 2**62 + 1},
        ),
        rank=2,
        global_rank=4,
        scale=1.5,
        trainable=frozenset({"B"}),
        penalty=Penalty(name="orthogonality", weight=0.25),
        ratio=0.5,
    )

    result = dispatch_from(dispatch_header(dispatch), unpack_payload(pack_payload(dispatch.payload)))

    assert dispatch_header(dispatch) == dispatch_header(result)
    assert dispatch.payload.seeds == result.payload.seeds
    assert dispatch.payload.num_bytes == result.payload.num_bytes
    assert torch.equal(dispatch.payload.masks["q"], result.payload.masks["q"])
    for name, tensor in dispatch.payload.tensors.items():
        assert torch.equal(tensor, result.payload.tensors[name])


def test_payload_bytes_charge_values_masks_and_seeds():
    """4 bytes a float32, one bit a rank in whole bytes per module, 8 bytes a seed."""
    payload = Payload(
        tensors={"q.B": torch.zeros(3, 2)},
        masks={"q": torch.zeros(9, dtype=torch.bool), "v": torch.zeros(1, dtype=torch.bool)},
        seeds={"fresh": 1},
    )

    assert 3 * 2 * 4 + (2 + 1) + 8 == payload.num_bytes
    assert payload.num_bytes == unpack_payload(pack_payload(payload)).num_bytes


def test_a_partial_survives_the_way():
    partial = Partial(
        weight=7.0,
        count=2,
        sums={"head.score.weight": torch.randn(2, 3), "q.A": torch.randn(4, 3)},
        stacks={"model.q": Factors(B=torch.randn(5, 4), A=torch.randn(4, 3))},
    )

    result = unpack_partial(pack_partial(partial))

    assert (7.0, 2) == (result.weight, result.count)
    assert torch.equal(partial.sums["q.A"], result.sums["q.A"])
    assert torch.equal(partial.stacks["model.q"].B, result.stacks["model.q"].B)


def test_an_adapter_survives_the_way():
    adapter = Adapter(
        factors={"model.q": Factors(B=torch.randn(5, 0), A=torch.randn(0, 3))},
        head={"score.weight": torch.randn(2, 3)},
        scale=2.0,
    )

    result = unpack_adapter(pack_adapter(adapter))

    assert (2.0, {"model.q": 0}) == (result.scale, result.ranks)
    assert torch.equal(adapter.head["score.weight"], result.head["score.weight"])
