"""Updates as elements of a monoid: what a method's ``lift`` makes of one update, and how such parts are merged.

Sums are added, stacks of factors are put side by side. Since that is associative, updates are folded on the machine
where they arise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.platform.adapter import Factors
from fedloom.platform.errors import RoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A mergeable part of an aggregation.

    Attributes:
        weight: the sum of the weights of the updates in it.
        count: the number of updates in it.
        sums: weighted sums of tensors by name, but for ``coefficient``.
        coefficient: what the sums are still to be multiplied with: the weight of a single update, which is then added
            in one pass without a weighted copy; 1 once partials are merged.
        stacks: factors by module, B side by side and A (times the update's weight) on top of each other.
        rows: tensors of single updates by name, one update a row.
    """

    weight: float
    count: int
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    coefficient: float = 1.0
    stacks: Mapping[str, Factors] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Fold:
    """Partials merged from left to right into memory of their own, so that a server's does not grow with the cohort.

    Floating-point sums depend on their order, so callers keep the order of the cohort: first within a chunk, then
    the chunks in theirs.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._stacks: dict[str, list[Factors]] = {}
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """The number of updates that were added."""
        return self._count

    def add(self, partial: Partial) -> None:
        """Merge one more partial; its tensors are copied or kept, never changed."""
        if self._count == 0:
            # One call for all tensors: for small adapters the time of a round is that of the calls.
            products = torch._foreach_mul(list(partial.sums.values()), partial.coefficient) if partial.sums else []
            self._sums = dict(zip(partial.sums, products, strict=True))
        elif self._sums:
            terms = [partial.sums[name] for name in self._sums]
            torch._foreach_add_(list(self._sums.values()), terms, alpha=partial.coefficient)
        for module, factors in partial.stacks.items():
            self._stacks.setdefault(module, []).append(factors)
        for name, rows in partial.rows.items():
            self._rows.setdefault(name, []).append(rows)
        self._weight += partial.weight
        self._count += partial.count

    def result(self) -> Partial:
        """Return everything that was added, as one partial.

        Raises:
            RoundError: nothing was added.
        """
        if self._count == 0:
            raise RoundError("nothing to merge: no update arrived")
        stacks = {
            module: Factors(
                B=torch.cat([factors.B for factors in parts], dim=1),
                A=torch.cat([factors.A for factors in parts], dim=0),
            )
            for module, parts in self._stacks.items()
        }
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        return Partial(weight=self._weight, count=self._count, sums=self._sums, stacks=stacks, rows=rows)


def merge(partials: Iterable[Partial]) -> Partial:
    """Merge partials from left to right: sums are added, stacks are put side by side.

    Raises:
        RoundError: there is nothing to merge.
    """
    fold = Fold()
    for partial in partials:
        fold.add(partial)
    return fold.result()
