"""Whether an actor's share of a GPU holds what it trains, by what the device itself reports."""

import math
from dataclasses import dataclass

import torch

from fedloom.platform.errors import ExperimentError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNeed:
    """What an actor takes of a GPU: the fraction that it reserves, and the bytes that it trains in."""

    num_gpus: float
    need_bytes: float

    def check_device(self) -> None:
        """Measure this process's CUDA device, before anything is loaded, and refuse it if it is too small.

        Raises:
            ExperimentError: see :func:`check_gpu_memory`.
        """
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        check_gpu_memory(
            free_bytes=free_bytes, total_bytes=total_bytes, num_gpus=self.num_gpus, need_bytes=self.need_bytes
        )


def check_gpu_memory(*, free_bytes: float, total_bytes: float, num_gpus: float, need_bytes: float) -> None:
    """Refuse an actor whose GPU has too little free memory, or whose share of it is too small.

    Ray counts fractions of a GPU and knows nothing of its memory: four actors with a quarter each are placed on one
    device whether or not it holds four copies of the base model.

    Args:
        free_bytes: what the device has left once this process has begun to use it.
        total_bytes: what it has.
        num_gpus: what the actor has reserved; from 1 on it has its device for itself.
        need_bytes: the weights, and what training takes beside them.

    Raises:
        ExperimentError: it gives the arithmetic, and what would do.
    """
    need, total = need_bytes / GIB, total_bytes / GIB
    if need_bytes > total_bytes:
        raise ExperimentError(
            f"key population.profiles: training takes {need:.3g} GiB and a GPU of the cluster has {total:.3g} GiB. "
            "A smaller training.micro_batch_size, a lower rank or model.dtype bfloat16 needs less."
        )
    share = min(1.0, num_gpus)
    if need_bytes > share * total_bytes:
        enough = math.ceil(100 * need_bytes / total_bytes) / 100
        raise ExperimentError(
            f"key population.profiles: num_gpus {num_gpus:g} of a GPU with {total:.3g} GiB is {share * total:.3g} GiB, "
            f"but training takes {need:.3g} GiB. Set num_gpus to at least {enough:g}: then at most {int(1 / enough)} "
            "actors share a GPU."
        )
    if need_bytes > free_bytes:
        raise ExperimentError(
            f"key population.profiles: training takes {need:.3g} GiB, but only {free_bytes / GIB:.3g} of the "
            f"{total:.3g} GiB of a GPU are free: other processes hold the rest. End them, or ask Ray for fewer actors "
            "on it by a larger num_gpus."
        )
