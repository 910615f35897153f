"""On a CUDA device: the same rounds as on a CPU but for rounding, and the same bits each time."""

import math

import pytest
import torch
from small import finished, make_data, make_experiment, save_llama, save_roberta

from fedloom.platform.base_model import load_base_model
from fedloom.platform.preparation import assemble
from fedloom.platform.registry import method_names
from fedloom.platform.shared_model import shared_model

pytestmark = pytest.mark.gpu
DATA = make_data()


def trained(folder, name, *, num_gpus):
    """Run a small experiment whose profiles ask for ``num_gpus``; returns its rounds and its adapter."""
    profiles = [{"name": f"rank-{rank}", "share": 1, "rank": rank, "num_gpus": num_gpus} for rank in (2, 4)]
    experiment = make_experiment(folder, method={"name": name}, population={"profiles": profiles}, rounds=2)
    return finished(experiment)


@pytest.mark.parametrize("save", [save_llama, save_roberta])
@pytest.mark.parametrize("name", method_names())
def test_a_gpu_gives_what_a_cpu_gives(tmp_path, save, name):
    folder = save(tmp_path / "model")

    (on_gpu, _), (on_cpu, _) = trained(folder, name, num_gpus=0.5), trained(folder, name, num_gpus=0)

    for left, right in zip(on_gpu, on_cpu, strict=True):
        assert left.metrics["eval/loss"] == pytest.approx(right.metrics["eval/loss"], rel=1e-3)
    assert math.isfinite(on_gpu[-1].metrics["train/loss"])


@pytest.mark.parametrize("name", method_names())
def test_bits_repeat_on_a_gpu(tmp_path, name):
    folder = save_llama(tmp_path / "model")

    (_, first), (_, again) = trained(folder, name, num_gpus=0.5), trained(folder, name, num_gpus=0.5)

    assert all(torch.equal(tensor, again.tensors()[key]) for key, tensor in first.tensors().items())


def test_a_model_from_shared_memory_is_copied_to_the_device(tmp_path):
    prepared = assemble(make_experiment(save_llama(tmp_path / "model")), DATA)
    loaded, lacks = load_base_model(prepared.spec, device="cpu")

    built, _ = shared_model(loaded, lacks).build(device="cuda")

    weights = dict(loaded.named_parameters())
    assert all(parameter.is_cuda for parameter in built.parameters())
    assert all(torch.equal(parameter.cpu(), weights[name]) for name, parameter in built.named_parameters())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights_learn_on_a_gpu(tmp_path, bits):
    """Gradients reach every factor through them, and the loss is near that of whole weights."""
    pytest.importorskip("bitsandbytes")
    folder = save_llama(tmp_path / "model")
    profiles = [{"name": "all", "share": 1, "rank": 4, "num_gpus": 0.5}]
    changes = {"population": {"profiles": profiles}, "data": {"task": "causal_lm"}, "rounds": 2}
    whole, _ = finished(make_experiment(folder, **changes), make_data(task="causal_lm"))

    model = {"name": str(folder), "quantization": bits}
    rounds, adapter = finished(make_experiment(folder, model=model, **changes), make_data(task="causal_lm"))

    assert all(pair.B.abs().max() > 0 for pair in adapter.factors.values())
    assert rounds[-1].metrics["eval/loss"] == pytest.approx(whole[-1].metrics["eval/loss"], rel=0.05)
