"""FedAvgM: FedIT whose server moves along a running mean of the clients' mean change.

Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
arXiv:1909.06335, in the form that OpenFedLLM gives it for LoRA factors; equation numbers are UNCONFIRMED.

    D = sum_k p_k theta_k - theta,   p_k = n_k / sum_j n_j,   theta: every B, A and tensor of the head   server
    v <- D in the first round, else beta v + (1 - beta) D
    theta <- theta + v

With beta = 0 it is FedIT. A and B are moved apart, so the product's error is FedIT's.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from fedloom.methods.fedit import FedIT
from fedloom.methods.sums import adapter_of, means
from fedloom.platform.method import State, Traits
from fedloom.platform.partial import Partial


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM(FedIT):
    """Averages the factors and the head by number of examples, with momentum on the server.

    Attributes:
        beta: the share of the running mean that is kept in a round.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9

    traits: ClassVar[Traits] = Traits(
        title="FedAvgM",
        paper="arXiv:1909.06335",
        heterogeneous=False,
        global_rank="min",
        exact="no: factors are averaged apart",
        down="adapter of rank r, head",
        up="the same, trained",
        bytes_down="4 (r P + H)",
        bytes_up="4 (r P + H)",
        server="O(K r P)",
        exceptions={
            "federation_of_one": "after the first round the server takes a share of the client's step only",
            "no_op_round": "the running mean of earlier rounds moves the model on (219 % in the law's test)",
        },
    )

    def finish(self, state: State, merged: Partial) -> State:
        """Add the running mean of the changes."""
        old = state.adapter.tensors()
        change = {name: mean - old[name] for name, mean in means(merged, old).items()}
        slots = {
            f"v.{name}": self.beta * state.slots[f"v.{name}"] + (1 - self.beta) * delta if state.slots else delta
            for name, delta in change.items()
        }
        new = {name: tensor + slots[f"v.{name}"] for name, tensor in old.items()}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter), slots=slots)
