"""Penalties that a dispatch may add to a client's loss, by name."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # B: (d_out, r), A: (r, d_in)


def orthogonality(pairs: Iterable[Pair]) -> Tensor:
    """Half the squared off-diagonal Gram entries of the rows of A and the columns of B, summed over modules.

    (1/2) sum_l ||off(A A^T)||_F^2 + ||off(B^T B)||_F^2, off(X) = X without its diagonal. It is zero as soon as the
    directions are orthogonal, whatever their norms, so that B = 0 is not fought and importances stay free.
    """
    total = torch.zeros(())
    for B, A in pairs:
        for gram in (A @ A.T, B.T @ B):
            off = gram - torch.diag(torch.diagonal(gram))
            total = total.to(off.device) + 0.5 * off.square().sum()
    return total


def tail(pairs: Iterable[Pair], *, keep: float) -> Tensor:
    """The size of the last directions: sum_l ||B[:, t:]||_F ||A[t:, :]||_F, t = floor(keep r) of each module's r.

    Where B = 0 its gradient is zero.
    """
    total = torch.zeros(())
    for B, A in pairs:
        first = int(keep * B.shape[1] + 1e-9)
        size = torch.linalg.vector_norm(B[:, first:]) * torch.linalg.vector_norm(A[first:])
        total = total.to(size.device) + size
    return total


PENALTIES: dict[str, Callable[..., Tensor]] = {"orthogonality": orthogonality, "tail": tail}
