"""FSLoRA: each client trains a random sub-matrix pair (a sketch) of one adapter of full rank.

Fang et al., Federated Sketching LoRA, arXiv:2501.19389. The paper's theorem and algorithm box were not at hand;
what stands here follows the released code's intent, the overview figure and reviews.

    S = (r / k) sum_{j in I} e_j e_j^T,   I: k of the r indices, uniform without replacement,   E[S] = I_r
    client:  trains W0 + s B S A.   B S A = (r / k) B[:, I] A[I, :], so it holds a plain adapter of rank k
             with the scale s r / k, and its gradients are the selected ones of the full adapter
    server:  D = (1/|C|) sum_{i in C} scatter_I(trained - received)
             avg:   (B, A) <- (B, A) + eta D          adamw:   one AdamW step along -D with lasting moments

The mean is uniform over the participants and never divided by how many of them touched a column: the factor r / k
in S already makes up for the chance k / r of being drawn. A and B of a module share I. One sketch a round, client and
module (scope ``module``) is the code's intent; whether the paper draws by module is UNCONFIRMED, as is the server's
AdamW, which the code runs and the paper may not mention.

The option ``rest: frozen`` (ours, not in the paper) keeps the other ranks at work beside the sketch, frozen for the
round: the client trains B[:, I], A[I, :] over W0 + s sum_{j not in I} B[:, j] A[j, :], at the scale s without r / k,
and so starts from the server's whole model. It downloads all ranks.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.sending import change, whole
from fedloom.methods.server_step import adamw
from fedloom.methods.sums import adapter_of, draw_seed, first_state, heads, means, refuse_larger_rank
from fedloom.platform.adapter import Adapter, Factors, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.seeds import generator_for

LEARNING_RATES = {"avg": 1.0, "adamw": 3e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class FSLoRA:
    """Sketches the ranks and averages the differences of the sketched factors.

    Attributes:
        scope: whether each module has index sets of its own, or the whole model shares one.
        rest: of the ranks that a client does not train: ``absent``, as in the paper, or ``frozen`` at work beside the
            others (ours).
        server_step: ``avg`` adds the mean difference; ``adamw`` takes it as a pseudo-gradient, as the code does.
        server_lr: eta of the server's step; ``None`` means 1 for ``avg`` and 3e-4 (the code's) for ``adamw``.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        weight_decay: AdamW's decoupled weight decay; 0.01 is torch's default, which the code leaves in place.
    """

    scope: Literal["module", "model"] = "module"
    rest: Literal["absent", "frozen"] = "absent"
    server_step: Literal["avg", "adamw"] = "avg"
    server_lr: Annotated[float, Field(gt=0)] | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    traits: ClassVar[Traits] = Traits(
        title="FSLoRA",
        paper="arXiv:2501.19389",
        heterogeneous=True,
        global_rank="max",
        has_ratio=True,
        changeable=("server_lr",),
        additive="change",
        exact="no: factors of sketches are averaged apart",
        down="r_k random columns and rows (or all r), their seed, head",
        up="their changes, head",
        bytes_down="4 (r_k P + H) + 8",
        bytes_up="4 (r_k P + H)",
        server="O(K r P)",
        exceptions={"split_client": "the mean is uniform over clients, so a client split in two counts twice"},
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send B[:, I] and A[I, :] with the scale s r / k, and the seed of I."""
        rank = max(state.adapter.ranks.values())
        if budget.ratio is None:
            refuse_larger_rank(client, budget.rank, rank)
        k = budget.rank if budget.ratio is None else min(rank, max(1, int(rank * budget.ratio + 1e-9)))
        seed = draw_seed(generator)
        if self.rest == "frozen":
            return self._beside_the_rest(state, k, seed)
        chosen = {}
        for module, factors in state.adapter.factors.items():
            index = self.sketch(seed, module, k, rank).to(factors.A.device)
            chosen[module] = Factors(B=factors.B[:, index], A=factors.A[index])
        scale = state.adapter.scale * (rank / k)
        sent = Adapter(factors=chosen, head=state.adapter.head, scale=scale)
        payload = Payload(tensors=sent.tensors(), seeds={"sketch": seed})
        return Dispatch(payload=payload, rank=k, global_rank=rank, scale=scale, sends="change")

    def _beside_the_rest(self, state: State, k: int, seed: int) -> Dispatch:
        """Send all ranks with the scale s, and the seed of those that are trained."""
        every = whole(state)
        trained = {m: tuple(self.sketch(seed, m, k, every.rank).tolist()) for m in state.adapter.factors}
        payload = replace(every.payload, seeds={"sketch": seed})
        return replace(every, payload=payload, rank=k, trained=trained, sends="change", shared=None)

    def sketch(self, seed: int, module: str, k: int, rank: int) -> Tensor:
        """Return I, sorted: int64 of shape (k,). The order is kept so that k = r is the identity."""
        generator = generator_for("sketch", seed, module if self.scope == "module" else "")
        return torch.randperm(rank, generator=generator)[:k].sort().values

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the differences of the selected columns and rows, and of the head."""
        return Payload(tensors=change(dispatch, trained))

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Scatter the differences into zeros of the full rank; every participant weighs 1."""
        rank, seed = dispatch.global_rank, dispatch.payload.seeds["sketch"]
        sums = heads(payload.tensors)
        for module, delta in Adapter.from_tensors(payload.tensors, dispatch.scale).factors.items():
            index = self.sketch(seed, module, dispatch.rank, rank).to(delta.A.device)
            sums[f"{module}.B"] = delta.B.new_zeros(delta.B.shape[0], rank).index_copy(1, index, delta.B)
            sums[f"{module}.A"] = delta.A.new_zeros(rank, delta.A.shape[1]).index_copy(0, index, delta.A)
        return Partial(weight=1.0, count=1, sums=sums)

    def finish(self, state: State, merged: Partial) -> State:
        """Add the mean difference, or take an AdamW step along it."""
        old = state.adapter.tensors()
        delta = means(merged, old)
        rate = LEARNING_RATES[self.server_step] if self.server_lr is None else self.server_lr
        if self.server_step == "avg":
            new, slots = {name: tensor + rate * delta[name] for name, tensor in old.items()}, state.slots
        else:
            betas = {"beta1": self.beta1, "beta2": self.beta2}
            new, slots = adamw(state, delta, rate=rate, **betas, weight_decay=self.weight_decay)
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter), slots=slots)

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the adapter of full rank: S = I at evaluation."""
        return state.adapter, None
