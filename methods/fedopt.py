"""FedOpt: FedIT whose server takes an adaptive step along the clients' mean change: Adam, Yogi, Adagrad or AdamW.

Reddi et al., Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2, applied to LoRA factors as in OpenFedLLM.

    D = sum_k p_k theta_k - theta,   p_k = n_k / sum_j n_j,   theta: every B, A and tensor of the head   server
    m <- beta1 m + (1 - beta1) D,  m = 0 before
    v <- v + D^2                               adagrad    v = tau^2 before
         v - (1 - beta2) D^2 sign(v - D^2)     yogi
         beta2 v + (1 - beta2) D^2             adam
    theta <- theta + eta m / (sqrt(v) + tau)
    adamw: one step of torch's AdamW on the gradient -D, as FSLoRA's and FLASC's released servers take it

The first three have no bias correction. The paper's D is a uniform mean; ours weighs by number of examples.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.fedit import FedIT
from fedloom.methods.server_step import adamw
from fedloom.methods.sums import adapter_of, means
from fedloom.platform.method import State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedOpt(FedIT):
    """Averages the factors and the head by number of examples, with an adaptive optimiser on the server.

    Attributes:
        optimizer: ``adam``, ``yogi``, ``adagrad`` or ``adamw``.
        server_lr: eta.
        beta1: decay of the first moment.
        beta2: decay of the second moment; Adagrad has none.
        tau: what is added to the root of the second moment, which begins at its square; AdamW has 1e-8 and 0.
        weight_decay: AdamW's decoupled weight decay; torch's default is 0.01.
    """

    optimizer: Literal["adam", "yogi", "adagrad", "adamw"] = "adam"
    server_lr: Annotated[float, Field(gt=0)] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    traits: ClassVar[Traits] = Traits(
        title="FedOpt",
        paper="arXiv:2003.00295",
        heterogeneous=False,
        global_rank="min",
        exact="no: factors are averaged apart",
        down="adapter of rank r, head",
        up="the same, trained",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        server="O(K r P)",
        exceptions={
            "federation_of_one": "the server takes a step of its own length along the client's change",
            "no_op_round": "the moments of earlier rounds move the model on (91 % in the law's test)",
        },
    )

    def finish(self, state: State, merged: Partial) -> State:
        """Take one step of the optimiser."""
        old = state.adapter.tensors()
        change = {name: mean - old[name] for name, mean in means(merged, old).items()}
        if self.optimizer == "adamw":
            rates = {"rate": self.server_lr, "beta1": self.beta1, "beta2": self.beta2}
            new, slots = adamw(state, change, **rates, weight_decay=self.weight_decay)
        else:
            new, slots = {}, {}
            for name, tensor in old.items():
                m = (
                    self.beta1 * state.slots.get(f"m.{name}", torch.zeros_like(tensor))
                    + (1 - self.beta1) * change[name]
                )
                v = self._second(state.slots.get(f"v.{name}", torch.full_like(tensor, self.tau**2)), change[name])
                new[name] = tensor + self.server_lr * m / (v.sqrt() + self.tau)
                slots |= {f"m.{name}": m, f"v.{name}": v}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter), slots=slots)

    def _second(self, v: Tensor, change: Tensor) -> Tensor:
        square = change.square()
        if self.optimizer == "adagrad":
            return v + square
        if self.optimizer == "yogi":
            return v - (1 - self.beta2) * square * torch.sign(v - square)
        return self.beta2 * v + (1 - self.beta2) * square
