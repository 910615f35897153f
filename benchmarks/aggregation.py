"""What it costs a server to find the first directions of a mean of products, per layer of d x d.

    python -m benchmarks.aggregation [--dims 768 2048 4096] [--clients 10 50] [--repeats 5]

Four ways from the same stacked float32 factors to the first 64 directions:

    ours        fedloom.methods.algebra.stacked_svd: one-sided Gram matrices in float64, or the product where R >= d
    QR          QR of both stacks and the SVD of the core, float32
    two SVDs    thin SVDs of both stacks, then of the core: the pipeline of arXiv:2506.09199, float32
    dense       the d x d product and its SVD, float32: what FlexLoRA's released code does, but once and not per client

Times are CPU-milliseconds of one thread, medians over rounds in which the four take turns. Above d = 1024 the dense
product is decomposed once, for the smallest number of clients: its cost hardly depends on them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.methods.algebra import stacked_svd

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)  # of ten clients; more clients repeat them
KEPT = 64
LARGE = 1024
Pair = tuple[Tensor, Tensor]  # B: (d, kept) with the singular values, A: (kept, d)


def ours(B: Tensor, A: Tensor) -> Pair:
    """Run the engine of FlexLoRA and FLoRIST."""
    U, sigma, Vt = stacked_svd(B, A, KEPT)
    return U * sigma, Vt


def by_qr(B: Tensor, A: Tensor) -> Pair:
    """Take orthonormal bases of both stacks, and the SVD of the core between them."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return (Q_B @ U[:, :KEPT]) * sigma[:KEPT], Vt[:KEPT] @ Q_A.T


def by_two_svds(B: Tensor, A: Tensor) -> Pair:
    """Take thin SVDs of both stacks, and the SVD of the core between them."""
    U_B, S_B, V_B = torch.linalg.svd(B, full_matrices=False)
    U_A, S_A, V_A = torch.linalg.svd(A, full_matrices=False)
    U, sigma, Vt = torch.linalg.svd((S_B[:, None] * (V_B @ U_A)) * S_A, full_matrices=False)
    return (U_B @ U[:, :KEPT]) * sigma[:KEPT], Vt[:KEPT] @ V_A


def dense(B: Tensor, A: Tensor) -> Pair:
    """Decompose the product itself."""
    U, sigma, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    return U[:, :KEPT] * sigma[:KEPT], Vt[:KEPT]


WAYS: dict[str, Callable[[Tensor, Tensor], Pair]] = {"ours": ours, "QR": by_qr, "two SVDs": by_two_svds, "dense": dense}


def stacks(d: int, clients: int) -> Pair:
    """Return the stacked factors of Gaussian clients with equal weights."""
    generator = torch.Generator().manual_seed(d + clients)
    total = sum(RANKS[client % len(RANKS)] for client in range(clients))
    return torch.randn(d, total, generator=generator), torch.randn(total, d, generator=generator) / clients


def distance(one: Pair, other: Pair) -> float:
    """Return the relative Frobenius distance of two products, from their factors in float64."""
    B = torch.cat([one[0].double(), -other[0].double()], dim=1)
    A = torch.cat([one[1].double(), other[1].double()])
    return float(torch.linalg.norm(torch.linalg.qr(B).R @ A) / torch.linalg.norm(other[0].double()))


def measure(d: int, clients: int, repeats: int, *, skip: str | None) -> tuple[int, dict[str, float], dict[str, float]]:
    """Return the height of the stack, CPU-milliseconds and relative errors by way."""
    B, A = stacks(d, clients)
    U, sigma, Vt = stacked_svd(B.double(), A.double(), KEPT)
    times: dict[str, list[float]] = {name: [] for name in WAYS if name != skip}
    errors = {}
    for number in range(repeats + 1):
        for name, spent in times.items():
            if name == "dense" and d > LARGE and spent:
                continue
            begin = time.process_time()
            result = WAYS[name](B, A)
            spent.append(1000 * (time.process_time() - begin))
            if number == 0:
                errors[name] = distance(result, (U * sigma, Vt))
    # The first of several is a warm-up.
    return B.shape[1], {name: statistics.median(spent[1:] or spent) for name, spent in times.items()}, errors


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines, errors = [], []
    for d in arguments.dims:
        for clients in arguments.clients:
            skip = "dense" if d > LARGE and clients > min(arguments.clients) else None
            height, spent, wrong = measure(d, clients, arguments.repeats, skip=skip)
            cells = [
                f"{spent[name]:.1f} ({spent[name] / spent['ours']:.1f}x)" if name in spent else "" for name in WAYS
            ]
            lines.append(f"| {d} | {clients} | {height} | " + " | ".join(cells) + " |")
            cells = [f"{wrong[name]:.1e}" if name in wrong else "" for name in WAYS]
            errors.append(f"| {d} | {clients} | {height} | " + " | ".join(cells) + " |")
    header = f"| d | clients | R | {' | '.join(WAYS)} |\n|{'---|' * (3 + len(WAYS))}"
    print(f"torch {torch.__version__.split('+')[0]}, one thread, CPU-milliseconds per layer, {KEPT} directions kept:\n")
    print(header)
    print("\n".join(lines))
    print("\nRelative error of the product against the same directions in float64:\n")
    print(header)
    print("\n".join(errors))


if __name__ == "__main__":
    main()
