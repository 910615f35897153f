"""One client trained by DeepSpeed with two processes, beside the plain trainer: the same adapter, the time, the memory.

    fedloom doctor
    python -m benchmarks.deepspeed

The base model is a random Llama; each trainer gets the same adapter and the same batches, in a process of its own or
in two. Equality is the largest absolute difference of any number of the adapters after a round of one client, beside
the largest number of that adapter. Memory is the most that one process has ever held resident, of two the fuller;
`after` is what it holds when training is over. Seconds are the second client's: startup and first touches
are left out. Every process has one thread, so that two have twice the cores of one.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.platform.adapter import Adapter
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.deepspeed_worker import DeepSpeedWorker
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import Group, chunks_of, tasks_of
from fedloom.platform.preparation import Prepared, assemble, global_rank
from fedloom.platform.server import Server
from fedloom.platform.wire import unpack_adapter
from fedloom.platform.worker import ClientWorker

VOCABULARY, LENGTH, EXAMPLES, PAD = 4096, 64, 64, 1
MIB = 2**20
Memory = tuple[float, float]
# By default stage 3 leaves up to a thousand million parameters whole once they were used: all of this base.
LITTLE_WHOLE = {
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 1_000_000,
}


def prepared_world(folder: Path, hidden: int, layers: int, steps: int) -> Prepared:
    """Save a random Llama and describe two clients over random tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = np.random.default_rng(0).integers(4, VOCABULARY, 2 * EXAMPLES * LENGTH).astype(np.int32)
    data = FederatedData(
        task="causal_lm",
        input_ids=tokens,
        offsets=np.arange(0, len(tokens) + 1, LENGTH, dtype=np.int64),
        labels=np.ones(2 * EXAMPLES, dtype=np.int64),
        clients={"a": np.arange(EXAMPLES), "b": np.arange(EXAMPLES, 2 * EXAMPLES)},
        test=np.arange(2),
        label_names=(),
        pad_token_id=PAD,
        fingerprint="random",
    )
    document = {
        "model": {"name": str(folder)},
        "data": {"task": "causal_lm"},
        "population": {"profiles": [{"name": "all", "share": 1, "rank": 16}]},
        "cohort": {"size": 2},
        "training": {"batch_size": 8, "micro_batch_size": 4, "steps": steps},
        "chunk_size": 1,
    }
    return assemble(Experiment.model_validate(document), data)


def play(prepared: Prepared, worker: ClientWorker | DeepSpeedWorker) -> tuple[Adapter, float]:
    """Train both clients from the same start; returns the first one's adapter and the seconds of the second."""
    experiment = prepared.experiment
    head = worker.initial_head(experiment.seed)
    adapters, seconds = [], []
    for chunk in chunks_of(experiment, tasks_of(experiment, prepared.clients, prepared.shapes)):
        server = Server(threads=1)
        server.begin(experiment, prepared.shapes, global_rank(experiment, prepared), head, f"run-{chunk.index}")
        partial, records = worker.train(server.dispatch(chunk))
        if records[0].refused is not None:
            raise RuntimeError(records[0].refused)
        server.fold(0, partial)
        server.finish(1)
        adapters.append(unpack_adapter(server.export()))
        seconds.append(records[0].seconds)
    return adapters[0], seconds[1]


def plain_process(prepared: Prepared, pipe: Connection) -> None:
    """Train in this process and send back what the table needs."""
    worker = ClientWorker(prepared.spec, prepared.data, device="cpu", threads=1)
    pipe.send((*play(prepared, worker), resident_mib(os.getpid())))
    pipe.recv()  # tensors are fetched from here as long as this process is there


def plain(prepared: Prepared) -> tuple[Adapter, float, list[Memory]]:
    """Train with the plain trainer, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=plain_process, args=(prepared, theirs))
    process.start()
    adapter, seconds, memory = ours.recv()
    ours.send(None)
    process.join()
    return adapter, seconds, [memory]


def together(prepared: Prepared, options: Mapping[str, object]) -> tuple[Adapter, float, list[Memory]]:
    """Train with DeepSpeed, two processes of one thread."""
    group = Group(workers=2, options=json.dumps(options))
    worker = DeepSpeedWorker(prepared.spec, prepared.data, group=group, device="cpu", threads=2)
    try:
        adapter, seconds = play(prepared, worker)
        return adapter, seconds, [resident_mib(pid) for pid in worker.pids()]
    finally:
        worker.close()


def resident_mib(pid: int) -> Memory:
    """Return the MiB that a process has held resident at most, and those that it holds now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return int(found["VmHWM"]) / 1024, int(found["VmRSS"]) / 1024


def difference(left: Adapter, right: Adapter) -> float:
    """Return the largest absolute difference of any number."""
    others = right.tensors()
    return max(float((tensor - others[name]).abs().max()) for name, tensor in left.tensors().items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepared_world(Path(folder), chosen.hidden, chosen.layers, chosen.steps)
        size_mib = prepared.num_parameters * 4 / MIB
        print(f"base: {prepared.num_parameters / 1e6:.1f} million parameters, {size_mib:.0f} MiB")
        print("| trainer | processes | largest difference | of | seconds | MiB at most | MiB after |")
        print("|---|---|---|---|---|---|---|")
        expected = None
        for name, found in ways(prepared):
            adapter, seconds, memory = found
            expected = expected or adapter
            largest = max(float(tensor.abs().max()) for tensor in adapter.tensors().values())
            most, after = (max(one[index] for one in memory) for index in (0, 1))
            row = f"{difference(expected, adapter):.1e} | {largest:.2f} | {seconds:.2f} | {most:.0f} | {after:.0f}"
            print(f"| {name} | {len(memory)} | {row} |", flush=True)


def ways(prepared: Prepared) -> Iterator[tuple[str, tuple[Adapter, float, list[Memory]]]]:
    """Yield what each trainer has found: the plain one, then DeepSpeed by stage."""
    yield "plain", plain(prepared)
    for stage in range(4):
        zero = {"stage": stage} | (LITTLE_WHOLE if stage == 3 else {})
        yield f"deepspeed, stage {stage}", together(prepared, {"zero_optimization": zero})


if __name__ == "__main__":
    main()
