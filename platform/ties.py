"""Factors that are tied to each other: both are made of one matrix, B = L G^T and A = G R.

L, (d_out, k), and R, (k, d_in), are fixed, with k the smaller of d_out and d_in. Each row of L and each column of R has
one entry, so that neither is formed: the rows of L are dealt out at random among its k columns, as evenly as can be,
and column i holds +-1 / sqrt(m_i) in each of its m_i rows, so that L^T L = I; likewise R R^T = I.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.platform.adapter import Factors, kaiming_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """L and R of one module, by the place and the value of their entries, and G as it is at first."""

    rows: Tensor  # int64 (d_out,)
    row_values: Tensor  # float64 (d_out,)
    columns: Tensor  # int64 (d_in,)
    column_values: Tensor  # float64 (d_in,)
    first: Tensor  # (r, k)

    def factor_b(self, G: Tensor) -> Tensor:
        """Return L G^T, (d_out, r)."""
        return G.T[self.rows.to(G.device)] * self.row_values.to(G)[:, None]

    def factor_a(self, G: Tensor) -> Tensor:
        """Return G R, (r, d_in)."""
        return G[:, self.columns.to(G.device)] * self.column_values.to(G)

    def pair(self, G: Tensor) -> Factors:
        """Return both."""
        return Factors(B=self.factor_b(G), A=self.factor_a(G))

    def untied(self, A: Tensor) -> Tensor:
        """Return G = A R^T, which undoes :meth:`factor_a`."""
        places = self.columns.to(A.device)
        return A.new_zeros(len(A), self.first.shape[1]).index_add(1, places, A * self.column_values.to(A))

    def opposite(self) -> Factors:
        """Return the pair of the first G with its sign turned, in float64: beside it, the first G changes no weight."""
        pair = self.pair(self.first.double())
        return Factors(B=-pair.B, A=pair.A)


def drawn_ties(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tie]:
    """Draw the ties of modules of (d_out, d_in); the first G is uniform in [-1/sqrt(k), 1/sqrt(k)], float32."""
    generator = torch.Generator().manual_seed(seed)
    ties = {}
    for module, (d_out, d_in) in shapes.items():
        k = min(d_out, d_in)
        rows, row_values = _dealt(d_out, k, generator)
        columns, column_values = _dealt(d_in, k, generator)
        ties[module] = Tie(
            rows=rows,
            row_values=row_values,
            columns=columns,
            column_values=column_values,
            first=kaiming_rows(rank, k, generator),
        )
    return ties


def _dealt(size: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Deal ``size`` things out among k; returns the place of each, and its value."""
    places = torch.randperm(size, generator=generator) % k
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return places, signs / torch.bincount(places, minlength=k)[places].double().sqrt()
