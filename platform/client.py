"""One client as the server may know it, and what it may spend in a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One participant as the server may know it: never its data.

    ``memory`` is what it keeps since the last round in which its update was accepted; see ``platform/method.py``.
    """

    id: str
    profile: str
    rank: int  # where its profile's patterns name no other
    num_examples: int
    memory: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a client may spend in this round.

    Attributes:
        rank: the largest LoRA rank that its machine can bear in every module.
        ranks: by module, where it can bear more in some than in others; else empty.
        ratio: the share of the global rank that it may train (FSLoRA) or send (SOFT); ``None`` leaves it to the method.
    """

    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None

    @property
    def largest_rank(self) -> int:
        """The rank of the module in which it can bear the most."""
        return max(self.ranks.values(), default=self.rank)

    def share(self, global_rank: int) -> float:
        """Return the share of the global rank that it allows: its ratio, else its rank over the global one."""
        return min(1.0, self.rank / global_rank) if self.ratio is None else self.ratio
