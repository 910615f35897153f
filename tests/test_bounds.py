"""The upper bound of every federation: one client that holds all examples."""

import torch
from small import finished, make_data, make_experiment, save_llama

from fedloom.platform.adapter import Template
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.method import Dispatch, Payload
from fedloom.platform.preparation import assemble
from fedloom.platform.registry import build_method
from fedloom.platform.seeds import generator_for, seed_for
from fedloom.platform.trainer import train_client

PROFILE = {"name": "all", "share": 1, "rank": 4}


def test_fedit_with_one_client_is_centralised_training(tmp_path):
    """Three rounds give the bits of three local trainings, one after the other, with a new optimiser for each."""
    data = make_data(num_clients=1, per_client=60)
    experiment = make_experiment(save_llama(tmp_path), cohort={"size": 1}, population={"profiles": [PROFILE]})
    _, federated = finished(experiment, data)

    prepared = assemble(experiment, data)
    host = AdapterHost(prepared.spec, device="cpu")
    template = Template(
        shapes=host.shapes, head=host.initial_head(experiment.seed), rank=4, scale=experiment.adapter.scale
    )
    adapter = build_method("fedit", {}).init(template, generator_for(experiment.seed, "init")).adapter
    for number in range(3):
        plain = Dispatch(payload=Payload(tensors=adapter.tensors()), rank=4, global_rank=4, scale=adapter.scale)
        seed = seed_for(experiment.seed, "round", number, "client", "c0")
        settings = {"patch": None, "patch_scale": 1.0, "client": "c0", "seed": seed}
        trained = train_client(host, data, experiment.training, dispatch=plain, received=adapter, **settings)
        adapter = trained.adapter

    assert federated.scale == adapter.scale == experiment.adapter.scale
    for name, tensor in adapter.tensors().items():
        torch.testing.assert_close(federated.tensors()[name], tensor, rtol=1e-5, atol=1e-7)
