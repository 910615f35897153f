"""What training takes in the memory of a client's machine, and the largest rank that fits.

Counted are the frozen weights; for the adapter and the head, all in float32, the values, their gradients and the
optimiser's moments (two for AdamW, one for SGD with momentum); and what autograd keeps of the widest batch. The
process itself, the examples and the workspace of kernels come on top and are left to a trial.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedloom.platform.activations import activation_bytes
from fedloom.platform.base_model import ModelSpec
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment, TrainingSection
from fedloom.platform.experiment_trainer import stage_of
from fedloom.platform.experiment_world import Profile

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32_BYTES = 4
# A quantized weight: LLM.int8 keeps one byte; NF4 half a byte, and a float32 for every 64 of them.
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The memory of one training client.

    Attributes:
        weights_bytes: of the frozen base model.
        head_bytes: of the head's values, gradients and moments.
        rank_bytes: of one rank of the adapter: values, gradients, moments and activations.
        activation_bytes: of the base model's activations in the widest batch; ``None`` where they cannot be counted.
        largest_rank: what the smallest target module allows.
    """

    weights_bytes: int
    head_bytes: int
    rank_bytes: int
    activation_bytes: int | None
    largest_rank: int

    def total_bytes(self, rank: float) -> float:
        """Return the bytes of a client that trains ``rank`` ranks, the mean where modules differ."""
        return self.weights_bytes + self.head_bytes + (self.activation_bytes or 0) + rank * self.rank_bytes

    def rank_within(self, memory_bytes: float) -> int:
        """Return the largest rank that fits; 0 if none does."""
        left = memory_bytes - self.total_bytes(0)
        return min(self.largest_rank, int(left // self.rank_bytes)) if left > 0 else 0


def footprint_of(
    experiment: Experiment,
    spec: ModelSpec,
    data: FederatedData,
    *,
    num_parameters: int,
    num_quantizable: int,
    shapes: Mapping[str, tuple[int, int]],
    head_parameters: int,
) -> Footprint:
    """Count the memory of a client.

    Args:
        experiment: its model and training sections.
        spec: how to build the model.
        data: its longest training example makes the widest batch.
        num_parameters: of the frozen base model, embeddings included.
        num_quantizable: those of them that ``model.quantization`` is about.
        shapes: (d_out, d_in) by target module.
        head_parameters: values of the modules that are trained in full.
    """
    training = experiment.training
    trained = _trained_bytes(training)
    lengths = np.diff(data.offsets)
    length = max(int(lengths[examples].max(initial=1)) for examples in data.clients.values())
    at_once = min(training.batch_size, training.micro_batch_size or training.batch_size)
    batch_size = min(at_once, max(len(examples) for examples in data.clients.values()))
    between = FLOAT32_BYTES * batch_size * length * len(shapes)  # A x of every token and module
    return Footprint(
        weights_bytes=_weights_bytes(experiment, num_parameters, num_quantizable),
        head_bytes=trained * head_parameters,
        rank_bytes=trained * sum(d_out + d_in for d_out, d_in in shapes.values()) + between,
        activation_bytes=activation_bytes(
            spec, batch_size=batch_size, length=length, checkpointed=training.gradient_checkpointing
        ),
        largest_rank=min(min(shape) for shape in shapes.values()),
    )


def _weights_bytes(experiment: Experiment, num_parameters: int, num_quantizable: int) -> int:
    size = DTYPE_BYTES[experiment.model.dtype]
    quantized = QUANTIZED_BYTES.get(experiment.model.quantization, size)
    return int(size * (num_parameters - num_quantizable) + quantized * num_quantizable)


def footprint_on(profile: Profile, footprint: Footprint) -> Footprint:
    """Return what a client takes of the memory that its profile states, given what one process takes.

    The workers of a client have an adapter, a head and activations each; the latter are those of the whole batch, which
    is more than a worker's share. Stage 3 cuts the weights up. ``memory_gib`` is that of all workers of a client,
    ``gpu_memory_gib`` that of one.
    """
    workers = profile.workers
    cut = stage_of(profile.deepspeed) == 3
    weights_bytes = footprint.weights_bytes // workers if cut else footprint.weights_bytes
    if profile.num_gpus > 0:
        return replace(footprint, weights_bytes=weights_bytes)
    activations = footprint.activation_bytes
    return replace(
        footprint,
        weights_bytes=footprint.weights_bytes if cut else footprint.weights_bytes * workers,
        head_bytes=footprint.head_bytes * workers,
        rank_bytes=footprint.rank_bytes * workers,
        activation_bytes=None if activations is None else activations * workers,
    )


def memory_bytes_of(profile: Profile) -> float | None:
    """Return the memory in which a client of a profile trains: its GPU's if it has one, else its actor's."""
    gib = profile.gpu_memory_gib if profile.num_gpus > 0 else profile.memory_gib
    return None if gib is None else gib * GIB


def check_memory(experiment: Experiment, footprint: Footprint, rank_of: Mapping[str, float]) -> None:
    """Refuse a profile whose memory cannot hold what its clients train.

    Args:
        experiment: its profiles state the memory.
        footprint: of one process that trains a client.
        rank_of: the largest rank that a client trains, by profile; the mean where modules differ.

    Raises:
        ExperimentError: it names the profile, what it needs, what it has and the largest rank that would fit.
    """
    for profile in experiment.population.profiles:
        have, rank = memory_bytes_of(profile), rank_of[profile.name]
        held = footprint_on(profile, footprint)
        need = held.total_bytes(rank)
        if have is not None and need > have:
            fitting = held.rank_within(have)
            remedy = f"Rank {fitting} would fit." if fitting else _no_rank(held)
            raise ExperimentError(
                f"key population.profiles: profile {profile.name!r} has {_key(profile)} {have / GIB:g}, but training "
                f"rank {rank:g} takes {need / GIB:.3g} GiB. {remedy}"
            )


def with_automatic_ranks(experiment: Experiment, footprint: Footprint) -> Experiment:
    """Return the experiment with the largest rank that fits in the place of every ``rank: auto``.

    Raises:
        ExperimentError: not even rank 1 fits.
    """
    profiles = [
        profile.model_copy(update={"rank": _automatic_rank(profile, footprint)}) if profile.rank == "auto" else profile
        for profile in experiment.population.profiles
    ]
    population = experiment.population.model_copy(update={"profiles": tuple(profiles)})
    return experiment.model_copy(update={"population": population})


def _automatic_rank(profile: Profile, footprint: Footprint) -> int:
    have = memory_bytes_of(profile) or 0.0  # the experiment's check has asked for it
    footprint = footprint_on(profile, footprint)
    rank = footprint.rank_within(have)
    if rank:
        return rank
    raise ExperimentError(
        f"key population.profiles: profile {profile.name!r} has {_key(profile)} {have / GIB:g} and rank 'auto', but no "
        f"rank fits. {_no_rank(footprint)}"
    )


def _no_rank(footprint: Footprint) -> str:
    return (
        f"Even rank 1 needs {footprint.total_bytes(1) / GIB:.3g} GiB; a smaller training.micro_batch_size needs less."
    )


def _key(profile: Profile) -> str:
    return "gpu_memory_gib" if profile.num_gpus > 0 else "memory_gib"


def _trained_bytes(training: TrainingSection) -> int:
    moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return FLOAT32_BYTES * (2 + moments)
