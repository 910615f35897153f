"""What it costs a server to find the first directions of a mean of products, per layer of d x d.

    python -m benchmarks.aggregation [--dims 768 2048 4096] [--clients 10 50 100] [--repeats 5]

Four ways from the same stacked float32 factors to the first 64 directions:

    ours        fedloom.methods.algebra.stacked_svd: one-sided Gram matrices in float64, or the product where R >= d
    QR          QR of both stacks and the SVD of the core, float32
    two SVDs    thin SVDs of both stacks, then of the core: the pipeline of arXiv:2506.09199, float32
    dense       the d x d product and its SVD, float32: what FlexLoRA's released code does, but once and not per client

Times are CPU-milliseconds of one thread, medians over rounds in which the four take turns. Above d = 1024 the dense
product is decomposed once, for the smallest number of clients: its cost hardly depends on them.

The floor is 2 d R^2 (both Gram matrices, symmetric) + 4 d R r + 4/3 n^3 + 2 n^2 r operations, n = min(R, d), at the
rate of a float64 matrix product of 1024 x 1024, measured in the same turns. Memory is what our way takes above its
inputs at its peak, by the kernel's count. At last, ours on 64 layers of 4096 x 4096 and ten clients, one after
another: the queries and values of a model like Llama-7B.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def floor_flops(d: int, R: int) -> float:
    """Return the operations that cannot be avoided by Gram matrices; see above."""
    n = min(R, d)
    return 2 * d * R**2 + 4 * d * R * KEPT + 4 / 3 * n**3 + 2 * n**2 * KEPT


def peak_mib(work: Callable[[], object]) -> float:
    """Return what a call takes at its peak above what was there before it, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_mib("VmRSS")
    work()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """Return a line of the kernel's account of this process's memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def cpu_ms(work: Callable[[], Pair | Tensor]) -> tuple[float, Pair | Tensor]:
    """Return the CPU-milliseconds of a call, and its result."""
    begin = time.process_time()
    result = work()
    return 1000 * (time.process_time() - begin), result


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One size: the height of the stack, CPU-milliseconds and relative errors by way, and what ours needs beyond."""

    height: int
    ms: dict[str, float]
    errors: dict[str, float]
    floors: float
    mib: float


def measure(d: int, clients: int, repeats: int, *, skip: str | None) -> Measured:
    """Let the four ways take turns on one size."""
    B, A = stacks(d, clients)
    U, sigma, Vt = stacked_svd(B.double(), A.double(), KEPT)
    exact = U * sigma, Vt
    square = torch.randn(1024, 1024, dtype=torch.float64)
    times: dict[str, list[float]] = {name: [] for name in WAYS if name != skip}
    products, errors = [], {}
    for number in range(repeats + 1):
        products.append(cpu_ms(lambda: square @ square)[0])
        for name, spent in times.items():
            if name == "dense" and d > LARGE and spent:
                continue
            ms, result = cpu_ms(lambda name=name: WAYS[name](B, A))
            spent.append(ms)
            if number == 0:
                errors[name] = distance(result, exact)
    # The first of several is a warm-up.
    medians = {name: statistics.median(spent[1:] or spent) for name, spent in times.items()}
    flops_per_ms = 2 * len(square) ** 3 / statistics.median(products[1:])
    return Measured(
        height=B.shape[1],
        ms=medians,
        errors=errors,
        floors=medians["ours"] / (floor_flops(d, B.shape[1]) / flops_per_ms),
        mib=peak_mib(lambda: ours(B, A)),
    )


def whole_model(layers: int, d: int) -> float:
    """Return the CPU-seconds of ours over the layers of a model, each with factors of its own, ten clients."""
    return sum(cpu_ms(lambda pair=pair: ours(*pair))[0] for pair in (stacks(d, 10) for _ in range(layers))) / 1000


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(d, clients) for d in arguments.dims for clients in arguments.clients]
    found = {}
    for d, clients in sizes:
        skip = "dense" if d > LARGE and clients > min(arguments.clients) else None
        found[d, clients] = measure(d, clients, arguments.repeats, skip=skip)
    print(f"torch {torch.__version__.split('+')[0]}, one thread, CPU-milliseconds per layer, {KEPT} directions kept:\n")
    print(f"| d | clients | R | {' | '.join(WAYS)} | ours / floor | ours, MiB |\n|{'---|' * (5 + len(WAYS))}")
    for (d, clients), m in found.items():
        cells = [f"{m.ms[name]:.1f} ({m.ms[name] / m.ms['ours']:.1f}x)" if name in m.ms else "" for name in WAYS]
        print(f"| {d} | {clients} | {m.height} | {' | '.join(cells)} | {m.floors:.1f} | {m.mib:.0f} |")
    print("\nRelative error of the product against the same directions in float64:\n")
    print(f"| d | clients | R | {' | '.join(WAYS)} |\n|{'---|' * (3 + len(WAYS))}")
    for (d, clients), m in found.items():
        cells = [f"{m.errors[name]:.1e}" if name in m.errors else "" for name in WAYS]
        print(f"| {d} | {clients} | {m.height} | {' | '.join(cells)} |")
    print(f"\n64 layers of 4096 x 4096, ten clients: {whole_model(64, 4096):.2f} CPU-seconds")


if __name__ == "__main__":
    main()
