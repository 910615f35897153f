"""Client-steps per second of the engine, beside a bare PEFT loop on the same cores.

    python -m benchmarks.training

Both train the same clients of `builtin:tiny` on `builtin:stdlib`: the same batches in the same order, AdamW, rank 8 on
q and v, one thread per process, one process per core.

    bare      in each process: `get_peft_model` once, then for every client a new AdamW and its steps; nothing is sent,
              swapped, checked or averaged
    fedloom   `RayExecutor.train` and `finish`: dispatch, swap, train, check, fold, average

The ways alternate, round by round, on the same idle machine; startup is left out of both.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import ray
import torch

from fedloom.platform.base_model import ModelSpec, load_base_model
from fedloom.platform.data.federated import FederatedData, collate
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, pools_of
from fedloom.platform.preparation import Prepared, global_rank, prepare, world_of
from fedloom.platform.ray_executor import RayExecutor
from fedloom.platform.seeds import seed_for
from fedloom.platform.trainer import batches

RANK = 8


def bare_process(
    spec: ModelSpec, data: FederatedData, experiment: Experiment, names: Sequence[str], pipe: Connection
) -> None:
    """Train clients in a plain loop whenever a round number comes, and send back the number of steps."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.set_num_threads(1)
    base, _ = load_base_model(spec, device="cpu")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, modules_to_save=["score"])
    model = get_peft_model(base, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = experiment.training
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        steps = 0
        for name in names:
            optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
            seed = seed_for(experiment.seed, "round", number, "client", name)
            for indices in batches(data.clients[name], settings, seed):
                loss = model(**collate(data, indices)).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
                optimizer.step()
                steps += 1
        pipe.send(steps)


class BareLoop:
    """One bare process per core, each with its share of the cohort."""

    def __init__(self, prepared: Prepared, experiment: Experiment, names: Sequence[str], processes: int) -> None:
        """Start the processes and wait until their models are loaded."""
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for index in range(processes):
            ours, theirs = context.Pipe()
            arguments = (prepared.spec, prepared.data, experiment, names[index::processes], theirs)
            context.Process(target=bare_process, args=arguments, daemon=True).start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def round(self, number: int) -> tuple[int, float]:
        """Return the steps and seconds of one pass over the cohort."""
        begin = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(number)
        steps = sum(pipe.recv() for pipe in self._pipes)
        return steps, time.perf_counter() - begin

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)


def main() -> None:
    """Print both rates and their ratio, median over rounds."""
    parser = argparse.ArgumentParser(description="Client-steps per second beside a bare PEFT loop.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    options = parser.parse_args()
    processes = os.cpu_count() or 1
    experiment = Experiment.model_validate(
        {
            "data": {"max_length": options.max_length},
            "partition": {"num_clients": options.clients},
            "cohort": {"size": options.clients},
            "population": {"profiles": [{"name": "equal", "share": 1, "rank": RANK}]},
            "training": {"steps": options.steps, "batch_size": 16},
        }
    )
    prepared = prepare(experiment)
    tasks = world_of(experiment, prepared).open(1).tasks
    chunks = chunks_of(experiment, tasks)
    executor = RayExecutor(prepared.spec, prepared.data, pools_of(experiment), actors=processes)
    bare = BareLoop(prepared, experiment, [task.client.id for task in tasks], processes)
    executor.begin(experiment, prepared.shapes, global_rank(experiment, prepared))
    rates: dict[str, list[float]] = {"bare": [], "fedloom": []}
    for number in range(options.rounds + 1):
        steps, seconds = bare.round(number)
        begin = time.perf_counter()
        records = executor.train(chunks)
        executor.finish(len(chunks))
        if number:  # the first round of each warms up
            rates["bare"].append(steps / seconds)
            rates["fedloom"].append(sum(record.steps for record in records) / (time.perf_counter() - begin))
    bare.close()
    executor.close()
    ratios = [ours / theirs for ours, theirs in zip(rates["fedloom"], rates["bare"], strict=True)]
    print(f"{processes} processes of one thread, {options.clients} clients x {options.steps} steps of 16 examples,")
    print(f"at most {options.max_length} tokens, torch {torch.__version__}, ray {ray.__version__}")
    for way, values in rates.items():
        print(f"{way:8} {statistics.median(values):7.1f} client-steps/s  [{min(values):.1f} .. {max(values):.1f}]")
    print(f"fedloom / bare {statistics.median(ratios):.3f}  [{min(ratios):.3f} .. {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
