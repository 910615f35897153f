"""What a server does with the mean change of its clients: the negative of it is the gradient of one optimiser step.

Moments are slots of the method's state and last between rounds. They mean something only where the basis of the
factors is stable: not after a decomposition, nor where clients start from fresh factors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedloom.platform.method import State

EPSILON = 1e-8  # torch's default


def adamw(
    state: State, change: Mapping[str, Tensor], *, rate: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one step of AdamW on the gradient ``-change``, as ``torch.optim.AdamW`` does.

    What nobody touched still moves by momentum and decay. Returns the new tensors of the adapter, and the slots ``m.*``
    and ``v.*``.
    """
    step = state.round + 1
    new: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}
    for name, tensor in state.adapter.tensors().items():
        zeros = torch.zeros_like(tensor)
        m = beta1 * state.slots.get(f"m.{name}", zeros) - (1 - beta1) * change[name]
        v = beta2 * state.slots.get(f"v.{name}", zeros) + (1 - beta2) * change[name].square()
        root = (v / (1 - beta2**step)).sqrt() + EPSILON
        new[name] = tensor * (1 - rate * weight_decay) - rate / (1 - beta1**step) * m / root
        slots |= {f"m.{name}": m, f"v.{name}": v}
    return new, slots
