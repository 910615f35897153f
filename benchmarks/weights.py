"""The memory of client actors that share the weights of their base model, and of actors that each load it.

    python -m benchmarks.weights

A random Llama is saved to a temporary folder, in bfloat16 and in float32, and used in float32. Actors of one node
build it in both ways, train nothing, and score the same examples, so that every layer has been read. Own memory is the
unique set size (USS): what would come free if the process ended. About 320 MiB of it are the libraries.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.platform.adapter import Template, initial_adapter
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.ray_cluster import start_ray
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.wire import pack_adapter

MIB = 2**20
VOCABULARY = 32_000
POOL = (("num_cpus", 0.25), ("num_gpus", 0.0))


def saved_model(folder: Path, hidden_size: int, dtype: str) -> tuple[ModelSpec, float]:
    """Save a random Llama of eight layers; returns how to load it in float32, and how many MiB that takes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    size_mib = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    spec = ModelSpec(
        path=str(folder),
        revision=None,
        dtype="float32",
        task="causal_lm",
        label_names=(),
        pad_token_id=0,
        targets=("q_proj", "v_proj"),
        dropout=0.0,
    )
    return spec, size_mib


def examples() -> FederatedData:
    """Return a client and eight held-out examples that touch many rows of the embedding."""
    rng = np.random.default_rng(0)
    return FederatedData(
        task="causal_lm",
        input_ids=rng.integers(1, VOCABULARY, 16 * 32).astype(np.int32),
        offsets=np.arange(0, 17 * 32, 32, dtype=np.int64),
        labels=np.ones(16, dtype=np.int64),
        clients={"c0": np.arange(8, dtype=np.int64)},
        test=np.arange(8, 16, dtype=np.int64),
        label_names=(),
        pad_token_id=0,
        fingerprint="random",
    )


def measured(spec: ModelSpec, data: FederatedData, *, actors: int, share: bool) -> dict[str, float]:
    """Start actors, let each score the examples, and measure them."""
    executor = RayExecutor(spec, data, [POOL], actors=actors, share_model=share)
    try:
        clients = [slot.actor for slot in executor.crew.slots]
        scores = ray.get([client.__ray_call__.remote(scored, data.test) for client in clients])
        assert len(set(scores)) == 1
        own = [psutil.Process(pid).memory_full_info().uss / MIB for pid in pids_of(clients)]
        return {"own_mib": statistics.median(own), "sum_mib": sum(own), "loss": scores[0]}
    finally:
        executor.close()


def pids_of(clients: list[ray.actor.ActorHandle]) -> list[int]:
    """Return the processes of actors."""
    pids: list[int] = ray.get([client.__ray_call__.remote(lambda _: os.getpid()) for client in clients])
    return pids


def scored(worker: object, indices: np.ndarray) -> float:
    """Score an untrained adapter in an actor; returns the loss."""
    shapes = worker._shapes  # type: ignore[attr-defined]
    template = Template(shapes=shapes, head={}, rank=1, scale=1.0)
    adapter = pack_adapter(initial_adapter(template, torch.Generator().manual_seed(0)))
    return worker.score(adapter, indices, 8).loss  # type: ignore[attr-defined,no-any-return]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Memory of client actors with and without shared weights.")
    parser.add_argument("--actors", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden-size", type=int, default=512)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    start_ray(None)  # one for all rows
    print("| file | weights | actors | own memory of one, MiB | of all, MiB |\n|---|---|---|---|---|")
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            spec, size_mib = saved_model(Path(folder), options.hidden_size, dtype)
            for actors in options.actors:
                rows = {share: measured(spec, examples(), actors=actors, share=share) for share in (False, True)}
                assert rows[False]["loss"] == rows[True]["loss"]
                for share, row in rows.items():
                    figures = f"{row['own_mib']:.0f} | {row['sum_mib']:.0f} |"
                    print(f"| {dtype} | {'shared' if share else 'of each'} | {actors} | {figures}", flush=True)
    print(f"weights in float32: {size_mib:.0f} MiB, torch {torch.__version__}, ray {ray.__version__}")
    ray.shutdown()


if __name__ == "__main__":
    main()
