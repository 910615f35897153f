"""HetLoRA: padded factors weighted by the norms of their products, and clients that shed their last directions.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, arXiv:2401.06432; known from
reviews and third-party code, equation numbers and default settings UNCONFIRMED. Self-pruning follows a third party's
re-implementation.

    client k receives  B[:, :r_k], A[:r_k, :]  and adds lambda T_k to its loss, with t = floor(gamma r_k),      client
        T_k = sum_modules ||B_k[:, t:]||_F ||A_k[t:, :]||_F
    if T_k after training < T_k on reception:  r_k <- max(r_min, floor(gamma r_k)), for good; the rest is cut   client
    w_k = S_k / sum_j S_j,   S_k = (sum_modules ||B_k A_k||_F^2)^(1/2)                                   server
    B = sum_k w_k pad_r(B_k),   A = sum_k w_k pad_r(A_k)                                                 server

pad_r appends zero columns (rows) up to the server's rank r. Whether the paper takes S_k over the model, as here, or by
module is UNCONFIRMED. The norm of a product is taken from two r_k x r_k matrices:
||B A||_F^2 = sum of the entries of (B^T B) * (A A^T). The head is averaged by number of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedloom.methods.sending import prefix
from fedloom.methods.sums import adapter_of, first_state, heads, means, padded, wide
from fedloom.platform.adapter import Adapter, Patch, Template
from fedloom.platform.client import Budget, Client
from fedloom.platform.method import Dispatch, Payload, Penalty, State, Traits
from fedloom.platform.partial import Partial
from fedloom.platform.penalties import tail


@dataclass(frozen=True, slots=True, kw_only=True)
class HetLoRA:
    """Averages padded factors by the norm of their product; clients shrink the tail of their ranks and cut it off.

    Attributes:
        gamma: the share of a client's directions that the penalty and the pruning leave alone.
        tail_penalty: lambda, the coefficient of the penalty; 0 trains without it.
        min_rank: r_min, below which no client prunes itself; ``None`` does without self-pruning.
    """

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    tail_penalty: Annotated[float, Field(ge=0)] = 1e-3
    min_rank: Annotated[int, Field(ge=1)] | None = 4

    traits: ClassVar[Traits] = Traits(
        title="HetLoRA",
        paper="arXiv:2401.06432",
        heterogeneous=True,
        global_rank="max",
        ranks_by_module=True,
        memory="the ranks to which it has pruned itself",
        prunes=True,
        exact="no: factors are averaged apart",
        down="the first r_k directions, head",
        up="the same, trained, less what is pruned",
        bytes_down="4 (r_k P + H)",
        bytes_up="4 (r_k P + H)",
        server="O(K r P + P sum_k r_k^2)",
        exceptions={
            "split_client": "weights are norms of products, so a client split in two counts twice",
            "no_op_round": "a direction that a client does not hold counts as zero (44 % in the law's test)",
        },
    )

    def init(self, template: Template, generator: torch.Generator) -> State:
        """Draw A; B = 0."""
        return first_state(template, generator)

    def dispatch(self, state: State, client: Client, budget: Budget, generator: torch.Generator) -> Dispatch:
        """Send the first r_k directions, and the penalty."""
        penalty = Penalty(name="tail", weight=self.tail_penalty, options={"keep": self.gamma})
        sent = prefix(state, client, _pruned(client, budget, list(state.adapter.factors)))
        # Payloads are shared by ranks or profile; where ranks differ by module, each client prunes in its own way.
        shared = None if client.memory and sent.ranks else sent.shared
        return replace(sent, penalty=penalty if self.tail_penalty else None, shared=shared)

    def upload(self, dispatch: Dispatch, trained: Adapter) -> Payload:
        """Send the trained adapter, cut to the ranks that are kept."""
        return Payload(tensors=trained.cut(self.kept_ranks(dispatch, trained)).tensors())

    def remember(self, dispatch: Dispatch, trained: Adapter) -> dict[str, Tensor]:
        """Keep the ranks: int64 of shape (modules,), in their order."""
        return {"ranks": torch.tensor(list(self.kept_ranks(dispatch, trained).values()))}

    def kept_ranks(self, dispatch: Dispatch, trained: Adapter) -> dict[str, int]:
        """Return r_k by module after training: smaller than before if the tail is."""
        if self.min_rank is None or self._tail(trained) >= self._tail(_received(dispatch)):
            return trained.ranks
        least = self.min_rank
        return {m: min(rank, max(least, int(self.gamma * rank + 1e-9))) for m, rank in trained.ranks.items()}

    def _tail(self, adapter: Adapter) -> float:
        return float(tail([(wide(pair.B), wide(pair.A)) for pair in adapter.factors.values()], keep=self.gamma))

    def lift(self, dispatch: Dispatch, payload: Payload, weight: float) -> Partial:
        """Return S_k times the padded factors, S_k itself, and n_k times the head."""
        norm = product_norm(Adapter.from_tensors(payload.tensors, dispatch.scale))
        full = padded(payload.tensors, dispatch.global_rank)
        sums = {name: (weight if name.startswith("head.") else norm) * tensor for name, tensor in full.items()}
        return Partial(weight=weight, count=1, sums={**sums, "norm": norm})

    def finish(self, state: State, merged: Partial) -> State:
        """Take the means. Where every product is zero there is nothing to weigh by, and the factors stay."""
        norm = merged.sums["norm"]
        new = {**state.adapter.tensors(), **means(merged, heads(merged.sums))}
        if norm > 0:
            factors = [name for name in new if not name.startswith("head.")]
            new |= {name: merged.sums[name] / norm for name in factors}
        return replace(state, round=state.round + 1, adapter=adapter_of(new, state.adapter))

    def export(self, state: State) -> tuple[Adapter, Patch | None]:
        """Return the mean adapter, of rank r."""
        return state.adapter, None


def _received(dispatch: Dispatch) -> Adapter:
    return Adapter.from_tensors(dispatch.payload.tensors, dispatch.scale)


def _pruned(client: Client, budget: Budget, modules: Sequence[str]) -> Budget:
    """Return the budget of a client that may have pruned itself."""
    if not client.memory:
        return budget
    kept = zip(modules, client.memory["ranks"].tolist(), strict=True)
    ranks = {module: min(budget.ranks.get(module, budget.rank), rank) for module, rank in kept}
    if len(set(ranks.values())) == 1:
        return replace(budget, rank=next(iter(ranks.values())), ranks={})
    return replace(budget, ranks=ranks)


def product_norm(adapter: Adapter) -> Tensor:
    """Return the Frobenius norm of all products B A together, without forming one; a tensor of no dimensions."""
    squares = [
        ((wide(pair.B).T @ wide(pair.B)) * (wide(pair.A) @ wide(pair.A).T)).sum() for pair in adapter.factors.values()
    ]
    return torch.stack(squares).sum().clamp_min(0).sqrt()
