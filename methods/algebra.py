"""The engine of the methods that average products: the singular values of ``sum_k w_k B_k A_k``, from its factors.

With the factors of all clients side by side, B = [B_1 ... B_K] of shape (d_out, R) and A = [w_1 A_1; ...; w_K A_K] of
shape (R, d_in), the sum is B A without cross terms. There are three exact routes:

    R >= min(d_out, d_in)   the product itself, in float64: it is the smallest thing at hand
    narrower than float64   one-sided Gram matrices in float64: B^T B = H^T H (Cholesky), H (A A^T) H^T = u S^2 u^T,
                            U = B H^-1 u, V^T = S^-1 u^T H A; one R x R eigenproblem. Where B^T B is badly conditioned
                            (clients that all but agree) the third route takes over
    float64                 B = Q_B R_B, A^T = Q_A R_A, and the singular values of the core R_B R_A^T

Of a large matrix of which few directions are kept, only those eigenvectors are computed (LAPACK's syevr).

Directions below the rounding of the terms that they are made of are dropped, so that a rank is a rank also where
clients agree exactly or nobody has trained. Signs are fixed: the largest entry of every column of U is positive.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fedloom.methods.sums import heads, total_weight, wide, widened
from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.errors import AdapterError
from fedloom.platform.method import Payload, State
from fedloom.platform.partial import Partial

Keep = int | Callable[[Tensor], int]
LARGEST_CONDITION = 1e6  # of H, by Frobenius norms: then U keeps its orthonormality to about 1e-6
SMALLEST_RATIO = 1e-5  # of singular values: below it V is made orthonormal once more
TIE = 1e-12
GRAM_BLOCKS = 4  # of a Gram matrix, of which only the lower triangle is computed: 5/8 of the work
PARTIAL_SIZE, PARTIAL_SHARE = 200, 6  # from this size on, and up to n / 6 directions, part of an eigensystem is quicker


class Svd(NamedTuple):
    """``U @ diag(sigma) @ Vt`` with sigma descending; shapes (d_out, q), (q,) and (q, d_in)."""

    U: Tensor
    sigma: Tensor
    Vt: Tensor


def stacked_svd(B: Tensor, A: Tensor, keep: Keep | None = None) -> Svd:
    """Decompose ``B @ A`` without forming it where R < min(d_out, d_in).

    Args:
        B: (d_out, R).
        A: (R, d_in).
        keep: how many directions are wanted: a number, or a function of all singular values (float64, descending). The
            vectors of the others are not formed. ``None`` keeps all above rounding.

    Returns:
        The first q directions, in float64 if B is, else in float32; q may be 0.

    Raises:
        AdapterError: a factor is not finite.
    """
    narrow = B.dtype != torch.float64
    # Products along rows of memory are the quickest: B is laid out by columns.
    B64, A64 = B.T.contiguous().double().T, A.contiguous().double()
    if B64.shape[0] > A64.shape[1]:  # work on the wide side
        V, sigma, Ut = _decomposed(A64.T, B64.T, narrow, keep)
        U, Vt = Ut.T, V.T
    else:
        U, sigma, Vt = _decomposed(B64, A64, narrow, keep)
    del B64, A64  # most of the memory that a layer takes, before the results are copied
    dtype = torch.float32 if narrow else torch.float64
    U, sigma, Vt = U.to(dtype), sigma.to(dtype), Vt.to(dtype)
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True)) if len(sigma) else U[:1]
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return Svd(U * signs, sigma, Vt * signs.T)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of ``B @ A`` that are above rounding, (q,) descending in float64, and no vectors."""
    seen: list[Tensor] = []

    def first(sigma: Tensor) -> int:
        seen.append(sigma)
        return 1  # one direction costs little, and part of an eigensystem is what is quick

    stacked_svd(B, A, first)
    return seen[0]


def energy_rank(sigma: Tensor, tau: float) -> int:
    """Return the smallest p with ``sum_{i<=p} sigma_i^2 >= tau sum_i sigma_i^2``; all of them for tau = 1, 0 for none.

    Sums are taken in float64, and a tie within 1e-12 counts as reached.
    """
    energy = sigma.double().square()
    if tau >= 1 or not energy.any():
        return int((energy > 0).sum())
    share = energy.cumsum(0) / energy.sum()
    return min(len(share), 1 + int((share < tau - TIE).sum()))


def lift_product(payload: Payload, weight: float) -> Partial:
    """Return one client's factors for the stack, its weight on the side of A alone, and its widened head."""
    factors = Adapter.from_tensors(payload.tensors, 1.0).factors
    stacks = {module: Factors(B=wide(pair.B), A=weight * wide(pair.A)) for module, pair in factors.items()}
    return Partial(weight=weight, count=1, sums=widened(heads(payload.tensors)), coefficient=weight, stacks=stacks)


def mean_product(merged: Partial, module: str, keep: Keep) -> Factors:
    """Return the first directions of the mean product: B = U diag(sigma), A = V^T with orthonormal rows.

    Raises:
        RoundError: the weights sum to zero.
    """
    weight, stack = total_weight(merged), merged.stacks[module]
    U, sigma, Vt = stacked_svd(stack.B, stack.A, keep)
    return Factors(B=U * (sigma / weight), A=Vt)


def beside_untouched(state: State, merged: Partial) -> Partial:
    """Return the stacks with one more term: the directions of W, weighted by the examples of those who held them not.

    The sums have what :func:`~fedloom.methods.sums.holders` gives.
    """
    stacks = {}
    for module, old in state.adapter.factors.items():
        stack = merged.stacks[module]
        left = (total_weight(merged) - merged.sums[f"held.{module}"][: old.rank]).to(old.A)
        B, A = torch.cat([old.B, stack.B], dim=1), torch.cat([left[:, None] * old.A, stack.A])
        stacks[module] = Factors(B=B, A=A)
    return replace(merged, stacks=stacks)


def balanced_svd(factors: Factors, keep: Keep | None) -> Factors:
    """Return the first directions of a product, its singular values shared: B = U sigma^(1/2), A = sigma^(1/2) V^T."""
    U, sigma, Vt = stacked_svd(factors.B, factors.A, keep)
    root = sigma.sqrt()
    return Factors(B=U * root, A=root[:, None] * Vt)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """How many directions of a spectrum (descending) are formed: those above ``noise`` that ``keep`` asks for."""

    keep: Keep | None
    noise: float

    def __call__(self, sigma: Tensor) -> int:
        real = int((sigma > self.noise).sum())
        most = self.keep(sigma[:real]) if callable(self.keep) else self.keep
        return real if most is None else min(real, most)


def _decomposed(B: Tensor, A: Tensor, narrow: bool, keep: Keep | None) -> Svd:
    """Choose the route for float64 factors with d_out <= d_in; ``narrow``: their values have float32's precision."""
    sizes = torch.linalg.vector_norm(B, dim=0) * torch.linalg.vector_norm(A, dim=1)  # of the R terms of rank one
    if not torch.isfinite(sizes).all():
        raise AdapterError("stacked factors hold NaN or infinity; such an update must be refused before it is merged")
    rounding = torch.finfo(torch.float32).eps if narrow else A.shape[1] * torch.finfo(torch.float64).eps
    wanted = _Wanted(keep=keep, noise=float(rounding * torch.linalg.vector_norm(sizes)))
    live = sizes > 0
    if not live.all():
        B, A = B[:, live], A[live]
    if B.shape[1] >= B.shape[0]:
        return _by_product(B @ A, narrow, wanted)
    return (_by_grams(B, A, wanted) if narrow else None) or _by_qr(B, A, wanted)


def _by_product(W: Tensor, narrow: bool, wanted: _Wanted) -> Svd:
    """W itself, wide: the eigenvectors of W W^T where float32's precision is asked for, else its SVD."""
    if narrow:
        sigma, U = _roots(_gram(W), wanted)
        return Svd(U, sigma, _rows(U.T @ W, sigma))
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    q = wanted(sigma)
    return Svd(U[:, :q], sigma[:q], Vt[:q])


def _by_grams(B: Tensor, A: Tensor, wanted: _Wanted) -> Svd | None:
    """One-sided Gram matrices; ``None`` where B^T B, its columns scaled to norm 1, is too close to singular."""
    gram = _gram(B.T)
    norms = gram.diagonal().sqrt()
    factor, failed = torch.linalg.cholesky_ex(gram / torch.outer(norms, norms), upper=True)
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(norms)).to(B), upper=True)
    if torch.linalg.norm(factor) * torch.linalg.norm(inverse) > LARGEST_CONDITION:
        return None
    H = factor * norms
    sigma, u = _roots(H @ _gram(A) @ H.T, wanted)
    Ut = ((inverse @ u) / norms[:, None]).T @ B.T
    return Svd(Ut.T, sigma, _rows((u.T @ H) @ A, sigma))


def _by_qr(B: Tensor, A: Tensor, wanted: _Wanted) -> Svd:
    """Orthonormal bases of both sides, and the singular values of the core between them."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    u, sigma, vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    q = wanted(sigma)
    return Svd(Q_B @ u[:, :q], sigma[:q], vt[:q] @ Q_A.T)


def _gram(X: Tensor) -> Tensor:
    """Return X X^T, of which the upper triangle is copied from the lower one."""
    n = len(X)
    width = max(1, -(-n // GRAM_BLOCKS))
    gram = X.new_empty(n, n)
    for first in range(0, n, width):
        last = min(first + width, n)
        gram[first:, first:last] = X[first:] @ X[first:last].T
        gram[first:last, last:] = gram[last:, first:last].T
    return gram


def _roots(gram: Tensor, wanted: _Wanted) -> tuple[Tensor, Tensor]:
    """Return the square roots of the wanted eigenvalues of a Gram matrix, descending, and their eigenvectors."""
    n = len(gram)
    most = n if wanted.keep is None or n < PARTIAL_SIZE or gram.device.type != "cpu" else wanted.keep
    if callable(most):
        most = wanted(_roots_of(_eigen(gram, eigvals_only=True)))
    partly = 0 < PARTIAL_SHARE * most <= n
    values, vectors = _eigen(gram, subset_by_index=[n - most, n - 1]) if partly else torch.linalg.eigh(gram)
    sigma = _roots_of(values)
    q = wanted(sigma)
    return sigma[:q], vectors[:, len(values) - q :].flip(1)


def _roots_of(values: Tensor) -> Tensor:
    return values.flip(0).clamp_min(0).sqrt()


def _eigen(gram: Tensor, **options: Any) -> Any:
    """Ask LAPACK's syevr for a part of an eigensystem, ascending, on one thread: bits depend on how many there are."""
    from scipy.linalg import eigh

    with _thread_pools().limit(limits=1, user_api="blas"):
        found = eigh(gram.numpy(), driver="evr", check_finite=False, **options)
    return tuple(torch.from_numpy(part) for part in found) if isinstance(found, tuple) else torch.from_numpy(found)


@cache
def _thread_pools() -> Any:
    """Return the pools of threads of the libraries that this process has loaded, scipy's among them."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _rows(scaled: Tensor, sigma: Tensor) -> Tensor:
    """Return S^-1 ``scaled``. Rows of small singular values have lost digits and are made orthonormal once more."""
    # in place: a copy would be a tenth of the memory that a layer takes
    rows = scaled.div_(sigma[:, None])
    if len(sigma) == 0 or sigma[-1] > SMALLEST_RATIO * sigma[0]:
        return rows
    Q, R = torch.linalg.qr(rows.T)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return cast(Tensor, (Q * signs).T)
