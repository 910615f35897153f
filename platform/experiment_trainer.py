"""What a profile may say of its trainer: the options of DeepSpeed that are a profile's, and those that are not."""

from collections.abc import Mapping
from typing import Any

DECIDED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
}
"""Options of DeepSpeed that would make another client of it than the plain trainer's, and the key that says it here."""

STAGES = (0, 1, 2, 3)


def check_trainer(
    profile: str, *, trainer: str, workers: int, options: Mapping[str, Any], num_cpus: float, num_gpus: float
) -> None:
    """Refuse what a profile's trainer cannot do.

    Raises:
        ValueError: it names the profile, the key and the nearest right answer.
    """
    if trainer == "plain":
        if workers > 1 or options:
            key = f"workers {workers}" if workers > 1 else "options for deepspeed"
            raise ValueError(f"profile {profile!r} has {key} and trainer 'plain'; set trainer: deepspeed")
        return
    for key, ours in DECIDED.items():
        if key in options:
            raise ValueError(f"profile {profile!r}: deepspeed.{key} is decided by {ours}, which holds for all clients")
    _check_zero(profile, options)
    if num_cpus < workers:
        raise ValueError(
            f"profile {profile!r} has num_cpus {num_cpus:g} for {workers} workers, who share them; "
            f"set num_cpus to at least {workers}"
        )
    if num_gpus > 0 and workers > 1 and num_gpus != workers:
        raise ValueError(
            f"profile {profile!r} has num_gpus {num_gpus:g} for {workers} workers, each of whom needs a whole one; "
            f"set num_gpus: {workers}"
        )


def stage_of(options: Mapping[str, Any]) -> int:
    """Return ZeRO's stage in DeepSpeed's options, which have been checked."""
    return int(options.get("zero_optimization", {}).get("stage", 0))


def _check_zero(profile: str, options: Mapping[str, Any]) -> None:
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"profile {profile!r}: deepspeed.zero_optimization must be a table, e.g. {{stage: 2}}")
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise ValueError(f"profile {profile!r}: deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key)
        if offload is None:
            continue
        if stage < lowest:
            raise ValueError(f"profile {profile!r}: deepspeed's {key} needs zero_optimization.stage {lowest} or more")
        if not isinstance(offload, Mapping) or offload.get("device", "cpu") not in {"cpu", "none"}:
            raise ValueError(
                f"profile {profile!r}: deepspeed's {key} goes to the CPU's memory, e.g. {key}: {{device: cpu}}; "
                "DeepSpeed would compile its access to disks in the middle of a round"
            )
