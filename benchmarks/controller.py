"""What it costs to decide a round: TSFA's solver over a shared band and over links, and the greedy baseline.

    python -m benchmarks.controller [--clients 10 100 1000] [--repeats 20]

Clients stand in a cell of 500 m under Rayleigh fading and differ in rank, examples, importance and time of training;
the queue stands where the optimum lies between the ends. Times are milliseconds from the conditions to the plan, on one
core: medians of the CPU's and of the clock's over rounds with channels of their own, and the largest of the clock's.
"""

import argparse
import statistics
import time

import numpy as np

from fedloom.platform.client import Budget
from fedloom.platform.world.controller import Conditions, Controller, build_controller
from fedloom.platform.world.network import Channel
from fedloom.platform.world.rates import rate_bit_per_s

RANK = 16
BAND_HZ = 1e7


def conditions(clients: int, seed: int, *, shared: bool) -> Conditions:
    """Return a round's conditions, all drawn from the seed."""
    draw = np.random.Generator(np.random.PCG64(seed))
    path_loss_db = 128.1 + 37.6 * np.log10(0.5 * np.sqrt(draw.uniform(4e-4, 1, clients)))
    snr_hz = 10 ** ((23 - path_loss_db + 174) / 10) * draw.exponential(size=clients)
    channel = Channel(
        snr_hz=snr_hz if shared else None,
        bandwidth_hz=BAND_HZ if shared else None,
        uplink_bit_per_s=rate_bit_per_s(BAND_HZ / clients, snr_hz),
        downlink_bit_per_s=np.full(clients, np.inf),
        delay_up_s=np.zeros(clients),
        delay_down_s=np.zeros(clients),
    )
    importance = draw.uniform(0.2, 1.8, clients)
    return Conditions(
        round=1,
        channel=channel,
        rank=RANK,
        budgets=tuple(Budget(rank=int(rank)) for rank in draw.choice([4, 8, 16], clients)),
        before_upload_s=draw.uniform(0.5, 2, clients),
        fixed_bits=np.full(clients, 1e4),
        factor_bits=np.full(clients, 32.0 * RANK * 24 * 1536),
        weights=draw.dirichlet(np.ones(clients)),
        importance=importance / importance.mean(),
        deadline_s=None,
    )


def milliseconds(controller: Controller, clients: int, repeats: int, *, shared: bool) -> tuple[float, float, float]:
    """Return medians of CPU and clock, and the largest time of the clock, over rounds with channels of their own."""
    cpu, clock = [], []
    for seed in range(repeats + 1):
        shown = conditions(clients, seed, shared=shared)
        state = {"queue_s": 3.0 / clients}
        begin_cpu, begin_clock = time.process_time(), time.perf_counter()
        controller.plan(state, shown)
        cpu.append(1e3 * (time.process_time() - begin_cpu))
        clock.append(1e3 * (time.perf_counter() - begin_clock))
    return statistics.median(cpu[1:]), statistics.median(clock[1:]), max(clock[1:])  # the first call loads code


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    tsfa = build_controller("tsfa", {"latency_limit_s": 5.0})
    cases = (
        ("tsfa, shared band", tsfa, True),
        ("tsfa, own links", tsfa, False),
        ("greedy_deadline", build_controller("greedy_deadline", {"deadline_s": 20.0}), True),
    )
    print(f"{'controller':20}{'clients':>8}{'CPU ms':>10}{'clock ms':>10}{'largest':>10}")
    for name, controller, shared in cases:
        for clients in options.clients:
            cpu, clock, largest = milliseconds(controller, clients, options.repeats, shared=shared)
            print(f"{name:20}{clients:8}{cpu:10.1f}{clock:10.1f}{largest:10.1f}")


if __name__ == "__main__":
    main()
