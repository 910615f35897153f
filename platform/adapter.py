"""LoRA adapters as values: factors per module, one scale, and the trained head.

A module with frozen weight W0 (d_out x d_in) computes W0 x + s B A x with B: (d_out, r), A: (r, d_in); methods that
freeze both train a core between them, and W0 x + s B C A x is computed. The scale s belongs to the adapter and never
depends on a client's rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from fedloom.platform.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The two factors of one module: the change of its weight is ``scale * B @ A``, or ``scale * B @ C @ A``.

    ``C`` is the core: h square blocks on the diagonal of an (r, r) matrix, the first between the first r / h columns of
    B and rows of A. It is there while a client trains it, and nowhere else.
    """

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    C: Tensor | None = None  # (h, r / h, r / h)

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterError(
                f"factors do not fit: B is {tuple(self.B.shape)} and A is {tuple(self.A.shape)}; "
                "B must be (d_out, r) and A (r, d_in)"
            )
        if self.C is not None and (self.C.ndim != 3 or self.C.shape[1] * len(self.C) != self.rank):
            raise AdapterError(
                f"a core of shape {tuple(self.C.shape)} does not fit rank {self.rank}: (h, r / h, r / h)"
            )

    @property
    def rank(self) -> int:
        """The number of columns of B and rows of A."""
        return self.A.shape[0]

    def product(self) -> Tensor:
        """Return B @ A of shape (d_out, d_in). For tests and exports: no method forms it in a round."""
        pair = self.folded()
        return pair.B @ pair.A

    def folded(self) -> "Factors":
        """Return the plain pair (B C, A)."""
        if self.C is None:
            return self
        blocks = self.B.reshape(len(self.B), *self.C.shape[:2])  # (d_out, h, r / h)
        return Factors(B=torch.einsum("ohp,hpq->ohq", blocks, self.C).flatten(1), A=self.A)

    def blocks(self, wanted: Sequence[int]) -> "Factors":
        """Return some directions, in the order in which they are wanted; where there is a core, some of its blocks."""
        if self.C is None:
            return Factors(B=self.B[:, list(wanted)], A=self.A[list(wanted)])
        size = self.C.shape[1]
        index = [block * size + place for block in wanted for place in range(size)]
        return Factors(B=self.B[:, index], A=self.A[index], C=self.C[list(wanted)])

    @property
    def num_blocks(self) -> int:
        """How many parts :meth:`blocks` can tell apart: the blocks of the core, else the directions."""
        return self.rank if self.C is None else len(self.C)

    def first(self, rank: int) -> "Factors":
        """Return views of the first ``rank`` columns of B and rows of A."""
        return Factors(B=self.B[:, :rank], A=self.A[:rank])

    def extended(self, spare: "Factors") -> "Factors":
        """Return these directions followed by those of ``spare`` beyond their number: as many as it has, or more."""
        rest = Factors(B=spare.B[:, self.rank :], A=spare.A[self.rank :])
        return Factors(B=torch.cat([self.B, rest.B], dim=1), A=torch.cat([self.A, rest.A], dim=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A low-rank adapter of a whole model.

    Attributes:
        factors: the factors by module name, e.g. ``model.layers.0.self_attn.q_proj``.
        head: tensors that are trained and averaged in full, e.g. ``score.weight`` of a classifier.
        scale: s, the same for every module, client and the server.
    """

    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor]
    scale: float

    @property
    def ranks(self) -> dict[str, int]:
        """The rank by module."""
        return {module: factors.rank for module, factors in self.factors.items()}

    def first(self, rank: int) -> "Adapter":
        """Return the adapter cut to its first ``rank`` directions per module, as views."""
        return Adapter(
            factors={module: factors.first(rank) for module, factors in self.factors.items()},
            head=self.head,
            scale=self.scale,
        )

    def cut(self, ranks: Mapping[str, int]) -> "Adapter":
        """Return the adapter with the named modules cut to their first ``ranks[module]`` directions, as views."""
        factors = {
            module: pair.first(ranks[module]) if module in ranks else pair for module, pair in self.factors.items()
        }
        return Adapter(factors=factors, head=self.head, scale=self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors under flat names: ``<module>.B``, ``.A``, ``.C`` if there is one, and ``head.<name>``."""
        flat = {}
        for module, factors in self.factors.items():
            flat[f"{module}.B"] = factors.B
            flat[f"{module}.A"] = factors.A
            if factors.C is not None:
                flat[f"{module}.C"] = factors.C
        return flat | {f"head.{name}": tensor for name, tensor in self.head.items()}

    @staticmethod
    def from_tensors(flat: Mapping[str, Tensor], scale: float) -> "Adapter":
        """Undo :meth:`tensors`.

        Raises:
            AdapterError: a factor lacks its partner.
        """
        head = {name.removeprefix("head."): tensor for name, tensor in flat.items() if name.startswith("head.")}
        modules = [name[:-2] for name in flat if name.endswith(".B") and not name.startswith("head.")]
        missing = [module for module in modules if f"{module}.A" not in flat]
        if missing:
            raise AdapterError(f"module {missing[0]!r} has a factor B but no factor A")
        factors = {
            module: Factors(B=flat[f"{module}.B"], A=flat[f"{module}.A"], C=flat.get(f"{module}.C"))
            for module in modules
        }
        return Adapter(factors=factors, head=head, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A permanent low-rank change of the frozen weights, in versioned pieces that stay in factored form.

    ``pieces[i]`` was made by round i; the patched weight of a module is W0 + scale * sum_i B_i A_i.
    """

    pieces: tuple[Mapping[str, Factors], ...] = ()
    scale: float

    @property
    def version(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def appended(self, piece: Mapping[str, Factors]) -> "Patch":
        """Return the patch with one more piece."""
        return Patch(pieces=(*self.pieces, piece), scale=self.scale)

    def factors(self) -> dict[str, Factors]:
        """Return all pieces side by side: one pair of factors per module whose product is the whole change."""
        modules = self.pieces[0] if self.pieces else {}
        return {
            module: Factors(
                B=torch.cat([piece[module].B for piece in self.pieces], dim=1),
                A=torch.cat([piece[module].A for piece in self.pieces], dim=0),
            )
            for module in modules
        }

    def num_bytes(self, *, since: int = 0) -> int:
        """Bytes of the pieces from version ``since`` on: what a client that holds ``since`` has missed."""
        return sum(
            factor.numel() * factor.element_size()
            for piece in self.pieces[since:]
            for factors in piece.values()
            for factor in (factors.B, factors.A)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The shapes from which a method makes its first adapter.

    Attributes:
        shapes: (d_out, d_in) by module.
        head: the initial head.
        rank: the global rank r.
        scale: s.
    """

    shapes: Mapping[str, tuple[int, int]]
    head: Mapping[str, Tensor]
    rank: int
    scale: float


def kaiming_rows(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Draw A as PEFT does: uniform in [-1/sqrt(d_in), 1/sqrt(d_in)], shape (rank, d_in), float32."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def initial_adapter(template: Template, generator: torch.Generator) -> Adapter:
    """Return the adapter before round 0: A drawn, B = 0, so that the model is the base model."""
    factors = {
        module: Factors(B=torch.zeros(d_out, template.rank), A=kaiming_rows(template.rank, d_in, generator))
        for module, (d_out, d_in) in template.shapes.items()
    }
    return Adapter(factors=factors, head=dict(template.head), scale=template.scale)


@lru_cache(maxsize=1)
def orthonormal_bases(shapes: tuple[tuple[str, int, int], ...], rank: int, seed: int) -> Mapping[str, Factors]:
    """Draw orthonormal columns of B and rows of A for modules given as (name, d_out, d_in); float32.

    The last ones are kept, since every client of a run redraws the same; nobody may write into them.

    Raises:
        AdapterError: a module has no room for ``rank`` orthonormal directions.
    """
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for module, d_out, d_in in shapes:
        if rank > min(d_out, d_in):
            raise AdapterError(
                f"module {module!r} is {d_out} x {d_in} and has no {rank} orthonormal directions; "
                f"set adapter.rank to at most {min(d_out, d_in)}"
            )
        B, A = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (d_out, d_in))
        bases[module] = Factors(B=B.contiguous(), A=A.T.contiguous())
    return MappingProxyType(bases)


def compose(adapter: Adapter, patch: Patch | None) -> Adapter:
    """Return one adapter whose effect is that of ``adapter`` over the patched weights: factors side by side.

    Raises:
        AdapterError: the two have different scales.
    """
    if patch is None or not patch.pieces:
        return adapter
    if patch.scale != adapter.scale:
        raise AdapterError(f"patch has scale {patch.scale} but the adapter has {adapter.scale}; they must agree")
    whole = patch.factors()
    factors = {
        module: Factors(B=torch.cat([whole[module].B, own.B], dim=1), A=torch.cat([whole[module].A, own.A], dim=0))
        for module, own in adapter.factors.items()
    }
    return Adapter(factors=factors, head=adapter.head, scale=adapter.scale)
