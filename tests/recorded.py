"""Runs on record that nobody trained: made-up metrics, clients and adapters, written as a real run writes them."""

import json

import numpy as np
import torch
from mlflow import MlflowClient
from safetensors.torch import save

from fedloom.platform.evaluation import ClientScore, clients_csv
from fedloom.platform.experiment import Experiment
from fedloom.platform.peft_layout import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from fedloom.platform.tracking import Tracking

ROUND_BYTES = 1_500_000


def experiment(method="fedit", seed=0, options=None, **changes):
    """Return an experiment of three rounds; ``options`` are the method's."""
    document = {"name": "made-up", "rounds": 3, "seed": seed, "method": {"name": method, **(options or {})}}
    return Experiment.model_validate(document | changes)


def adapter_files(rank, seed, scale=2.0):
    """Return the files of a PEFT adapter on four modules of 16 x 12, whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    falling = 2.0 ** -torch.arange(rank)
    tensors = {}
    for module in [f"layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in ("q_proj", "v_proj")]:
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(16, rank, generator=generator) * falling
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, 12, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}
    return {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: save(tensors)}


def record(
    tracking: Tracking, described, *, accuracy, parent=None, clock=True, bytes_up=ROUND_BYTES, tags=None, personal=None
):
    """Record a finished run that ends at this accuracy, its clients' own models at ``personal``; returns its id."""
    generator = np.random.default_rng(described.seed)
    facts = {"data.fingerprint": f"data-{described.seed}"} | (tags or {})
    with tracking.run(described, tags=facts, parent_run_id=parent) as run:
        for number in range(described.rounds + 1):
            reached = accuracy * (1 - 0.5 ** (2 * number + 1)) / (1 - 0.5 ** (2 * described.rounds + 1))
            metrics = {"eval/accuracy": reached, "eval/loss": 2.0 - reached, "bytes/total": 2.0 * bytes_up * number}
            if number:
                metrics |= {"bytes/up": bytes_up, "bytes/down": bytes_up, "seconds": 2.5}
            if clock and number:
                metrics["sim/seconds"] = 12.0 * number * bytes_up / ROUND_BYTES
            if personal is not None and number == described.rounds:
                own = {"mean": personal, "std": 0.1, "worst_decile": personal - 0.2}
                metrics |= {f"personal/accuracy/{name}": value for name, value in own.items()}
            run.log(number, metrics)
        scores = [
            ClientScore(client=f"c{i}", profile="phone", rank=4, num_examples=20, loss=1.0, accuracy=float(value))
            for i, value in enumerate(np.clip(accuracy + generator.normal(0, 0.08, 20), 0, 1))
        ]
        run.files("", {"clients.csv": clients_csv(scores)})
        run.files("adapters/final", adapter_files(4, described.seed))
    return run.run_id


def record_parent(tracking: Tracking, sweep):
    """Record a run that is to have children, as a sweep does; returns its id."""
    client = MlflowClient(tracking_uri=tracking.uri)
    (found,) = client.search_experiments(filter_string="name = 'fedloom'")
    run_id = client.create_run(found.experiment_id, run_name=sweep, tags={"fedloom.sweep": sweep}).info.run_id
    client.set_terminated(run_id)
    return run_id
