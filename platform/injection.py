"""PEFT's LoRA layers in a base model: put there once, and found again."""

from typing import Any

from torch import nn

from fedloom.platform.base_model import HEAD_MODULES, ModelSpec, quiet_transformers
from fedloom.platform.errors import ModelError, nearest

OWN = "default"  # PEFT's name for the adapter that a client trains


def with_lora_layers(base: Any, spec: ModelSpec) -> Any:
    """Let PEFT put its layers into a base model, of rank 1 at first, and make the head trainable.

    Raises:
        ModelError: the model has no target modules of these names.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    heads = [name for name in HEAD_MODULES if spec.task == "classification" and hasattr(base, name)]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if spec.task == "classification" else TaskType.CAUSAL_LM,
        r=1,
        target_modules=None if spec.targets is None else list(spec.targets),
        modules_to_save=heads or None,
        lora_dropout=spec.dropout,
    )
    try:
        with quiet_transformers():
            return get_peft_model(base, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
        hints = "".join(nearest(target, linear) for target in spec.targets or ())
        asked = "none, and PEFT knows no default for it" if spec.targets is None else ", ".join(spec.targets)
        raise ModelError(
            f"key adapter.targets: {type(base).__name__} has no such modules ({asked}).{hints} "
            f"Linear modules: {', '.join(linear)}."
        ) from error


def lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's layers by the names of the modules that they stand in for."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): part
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer) and OWN in part.lora_A
    }


def head_modules(model: Any) -> dict[str, Any]:
    """Return the wrappers of the modules that are trained in full, by name."""
    from peft.utils import ModulesToSaveWrapper

    return {
        name.removeprefix("base_model.model."): part
        for name, part in model.named_modules()
        if isinstance(part, ModulesToSaveWrapper)
    }
