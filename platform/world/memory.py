"""What a client actor needs at the least: a bound below, so that what it refuses can never run.

Counted are the frozen weights, and for the adapter and the head, all in float32, the values, their gradients and the
optimiser's moments: two for AdamW, one for SGD with momentum. Activations, buffers and the process come on top; they
depend on kernels and batches and are left to a trial.
"""

from collections.abc import Mapping

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment, TrainingSection

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32_BYTES = 4


def least_memory_bytes(
    experiment: Experiment, *, num_parameters: int, per_rank: int, head_parameters: int, rank: float
) -> float:
    """Return the bytes below which an actor cannot train ``rank`` ranks.

    Args:
        experiment: its model and training sections.
        num_parameters: of the frozen base model, embeddings included.
        per_rank: d_out + d_in, summed over the target modules.
        head_parameters: values of the modules that are trained in full.
        rank: the ranks that the actor trains.
    """
    frozen = DTYPE_BYTES[experiment.model.dtype] * num_parameters
    return frozen + _trained_bytes(experiment.training) * (rank * per_rank + head_parameters)


def check_memory(
    experiment: Experiment,
    *,
    num_parameters: int,
    shapes: Mapping[str, tuple[int, int]],
    head_parameters: int,
    rank_of: Mapping[str, float],
) -> None:
    """Refuse a profile whose memory cannot hold what its clients train.

    Args:
        experiment: its profiles state the memory.
        num_parameters: of the frozen base model.
        shapes: (d_out, d_in) by target module.
        head_parameters: values of the modules that are trained in full.
        rank_of: the largest rank that a client trains, by profile; the mean where modules differ.

    Raises:
        ExperimentError: it names the profile, what it needs, what it has and the largest rank that would fit.
    """
    per_rank = sum(d_out + d_in for d_out, d_in in shapes.values())
    for profile in experiment.population.profiles:
        if profile.memory_gib is None:
            continue
        without = least_memory_bytes(
            experiment, num_parameters=num_parameters, per_rank=per_rank, head_parameters=head_parameters, rank=0
        )
        each = _trained_bytes(experiment.training) * per_rank
        rank = rank_of[profile.name]
        have, need = profile.memory_gib * GIB, without + each * rank
        if need > have:
            fitting = int((have - without) // each) if have > without else 0
            remedy = f"Rank {fitting} would fit." if fitting else f"Even rank 1 needs {(without + each) / GIB:.3g} GiB."
            raise ExperimentError(
                f"key population.profiles: profile {profile.name!r} has memory_gib {profile.memory_gib:g}, but "
                f"training rank {rank:g} takes at least {need / GIB:.3g} GiB before activations. {remedy}"
            )


def _trained_bytes(training: TrainingSection) -> int:
    moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    return FLOAT32_BYTES * (2 + moments)
