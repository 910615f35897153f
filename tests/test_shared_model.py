"""A model that is built from shared memory is the model that was loaded, and nobody writes into what is shared."""

import pickle
import threading

import numpy as np
import pytest
import torch
from small import make_data, make_experiment, save_llama, save_roberta
from torch import nn

from fedloom.platform.base_model import load_base_model
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble
from fedloom.platform.ray_model import too_large
from fedloom.platform.shared_model import NotShareableError, shared_model
from fedloom.platform.worker import ClientWorker

KINDS = {
    "llama-classification": save_llama,
    "llama-causal_lm": save_llama,
    "roberta-classification": save_roberta,  # its embedding is tied, and it has buffers of integers
}


def arrived(shared):
    """As from Ray's object store: the skeleton was pickled, the arrays lie elsewhere and are read-only."""
    there = pickle.loads(pickle.dumps(shared))
    for array in there.arrays:
        array.flags.writeable = False
    return there


def lies_in(tensor, arrays):
    start = tensor.data_ptr()
    return any(b.ctypes.data <= start < b.ctypes.data + b.nbytes for b in arrays)


@pytest.fixture(scope="module", params=KINDS)
def setting(request, tmp_path_factory):
    """A spec, and its model taken apart."""
    folder = KINDS[request.param](tmp_path_factory.mktemp("models") / "model")
    experiment = make_experiment(folder, data={"task": request.param.split("-")[1]}, rounds=2)
    prepared = assemble(experiment, make_data(task=experiment.data.task))
    return experiment, prepared, arrived(shared_model(*load_base_model(prepared.spec, device="cpu")))


def test_every_tensor_comes_back_bit_for_bit_whether_or_not_a_checkpoint_has_it(setting):
    _, prepared, shared = setting
    loaded, lacks = load_base_model(prepared.spec, device="cpu")
    built, missing = shared.build(device="cpu")

    assert missing == lacks
    for found, expected in (
        (dict(built.named_parameters(remove_duplicate=False)), dict(loaded.named_parameters(remove_duplicate=False))),
        (dict(built.named_buffers(remove_duplicate=False)), dict(loaded.named_buffers(remove_duplicate=False))),
    ):
        assert found.keys() == expected.keys()
        new = set(lacks)  # drawn anew by every load, and then from the experiment's seed
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name not in new)


def test_weights_are_views_of_the_shared_memory_and_buffers_are_not(setting):
    _, _, shared = setting
    built, _ = shared.build(device="cpu")

    assert all(lies_in(weight, shared.arrays) for weight in built.parameters())
    assert list(built.buffers())
    assert not any(lies_in(buffer, shared.arrays) for buffer in built.buffers())


def test_a_run_on_shared_weights_has_the_same_bits_and_leaves_the_weights_alone(setting):
    experiment, prepared, shared = setting
    before = [buffer.copy() for buffer in shared.arrays]
    runs = []
    for base in (None, shared):
        executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment))
        for pool, worker in executor._workers.items():
            executor._workers[pool] = ClientWorker(
                prepared.spec, prepared.data, device="cpu", threads=worker._threads, base=base
            )
        try:
            rounds = list(run(experiment, prepared, executor))
            runs.append(([done.metrics | {"seconds": 0} for done in rounds], executor.export().tensors()))
        finally:
            executor.close()

    (metrics, tensors), (other_metrics, others) = runs
    assert metrics == other_metrics
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert all(np.array_equal(left, right) for left, right in zip(before, shared.arrays, strict=True))
    host = next(iter(executor._workers.values()))._host
    trained = {id(parameter) for parameter in host._head_parameters().values()}
    frozen = [p for name, p in host.model.named_parameters() if "lora_" not in name and id(p) not in trained]
    assert {parameter._version for parameter in frozen} == {0}, "no operation has written into a frozen weight"


class Odd(nn.Module):
    """Ties, views into one storage, strides, an empty tensor and a tensor that is neither weight nor buffer."""

    def __init__(self):
        super().__init__()
        whole = torch.arange(24, dtype=torch.float32)
        self.one = nn.Parameter(whole[:12].view(3, 4))
        self.other = nn.Parameter(whole[12:].view(4, 3).t())
        self.tied = self.one
        self.listed = [self.one]
        self.none = nn.Parameter(torch.empty(0, 5))
        self.narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.plain = torch.ones(2)
        self.register_buffer("hidden", torch.zeros(3), persistent=False)


def test_ties_views_and_strides_survive():
    model = Odd()
    shared = arrived(shared_model(model, frozenset()))
    built, _ = shared.build(device="cpu")

    assert built.tied is built.one
    assert built.listed[0] is built.one
    for name in ("one", "other", "none", "narrow", "plain", "hidden"):
        old, new = getattr(model, name), getattr(built, name)
        assert torch.equal(old, new)
        assert (old.stride(), old.dtype, old.requires_grad) == (new.stride(), new.dtype, new.requires_grad)
    distance = built.other.data_ptr() - built.one.data_ptr()
    assert distance == 12 * 4, "both lie in one buffer, as they did"
    assert sum(array.nbytes for array in shared.arrays) == 4 * 24 + 2 * 3
    assert sum(weight.numel() for weight in shared.skeleton.parameters()) == 0


def test_a_model_that_writes_into_its_weights_is_not_shared():
    with pytest.raises(NotShareableError, match=r"'0' shortens the rows of its weights \(max_norm\)"):
        shared_model(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), frozenset())


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.eye(3).to_sparse(), r"'part' is a Parameter \(torch\.sparse_coo, on cpu\)"),
        (torch.empty(1, device="meta"), r"'part' is a Parameter \(torch\.strided, on meta\)"),
    ],
)
def test_weights_that_cannot_be_shared_are_named(weight, reason):
    model = nn.Sequential(nn.Linear(1, 1))
    model.part = nn.Parameter(weight)
    with pytest.raises(NotShareableError, match=reason):
        shared_model(model, frozenset())


def test_parts_that_cannot_be_copied_are_named():
    model = nn.Sequential(nn.Linear(1, 1))
    model.part = threading.Lock()
    with pytest.raises(NotShareableError, match=r"a part of Sequential cannot be copied: .*lock"):
        shared_model(model, frozenset())


def test_weights_take_half_of_the_smallest_object_store_at_most():
    assert too_large(50, [100, 400]) is None
    assert "--object-store-memory" in too_large(51, [100, 400])
