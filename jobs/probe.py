"""What this machine takes for an experiment's work: one client of every profile trained, one shard evaluated."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment
from fedloom.platform.population import chunks_of, groups_of, pools_of, tasks_of
from fedloom.platform.preparation import Prepared, global_rank
from fedloom.platform.tasks.questions import PreparedTask

GIB = 2**30
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured.

    Attributes:
        training_s: real seconds of one client's training, by profile.
        evaluation_s: of evaluating the whole held-out split once, on one actor.
        tasks_s: of asking each task once, likewise, by its name.
        memory_gib: the most that this process, which held one base model, the data and the server, had of RAM.
        gpu_memory_gib: likewise of its GPU; 0 without one.
    """

    training_s: Mapping[str, float]
    evaluation_s: float
    tasks_s: Mapping[str, float]
    memory_gib: float
    gpu_memory_gib: float


def probe(prepared: Prepared) -> Probe:
    """Train one client of every profile twice, for the second time counts, evaluate one shard, and ask one batch."""
    first = {client.profile: client for client in reversed(prepared.clients)}
    experiment = prepared.experiment.model_copy(update={"chunk_size": 1})
    chunks = chunks_of(experiment, tasks_of(experiment, list(first.values()), prepared.shapes))
    executor = LocalExecutor(prepared.spec, prepared.data, pools_of(experiment), groups_of(experiment))
    try:
        executor.begin(experiment, prepared.shapes, global_rank(experiment, prepared))
        executor.train(chunks)
        executor.finish(len(chunks))
        training_s = {record.profile: record.seconds for record in executor.train(chunks)}
        longest = prepared.shards[-1]  # shards are cut by length
        begin = time.perf_counter()
        executor.evaluate([longest], experiment.evaluation.batch_size)
        evaluation_s = (time.perf_counter() - begin) * sum(len(shard) for shard in prepared.shards) / len(longest)
        tasks_s = {task.task.name: _asking_s(task, executor, experiment) for task in prepared.tasks}
    finally:
        executor.close()
    return Probe(
        training_s=training_s,
        evaluation_s=evaluation_s,
        tasks_s=tasks_s,
        memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES / GIB,
        gpu_memory_gib=torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0,
    )


def _asking_s(task: PreparedTask, executor: LocalExecutor, experiment: Experiment) -> float:
    """Return what a whole task takes, by a batch of its longest questions."""
    longest = task.shards[-1]
    batch_size = experiment.evaluation.batch_size
    asked = longest.questions[-max(1, batch_size // len(longest.questions[-1].sequences)) :]
    begin = time.perf_counter()
    executor.answer([replace(longest, questions=asked)], batch_size)
    return (time.perf_counter() - begin) * len(task.questions) / len(asked)
