"""What a controller is shown in tests: clients over a shared band, or over links of their own."""

import numpy as np

from fedloom.platform.client import Budget
from fedloom.platform.world.controller import Conditions
from fedloom.platform.world.network import Channel
from fedloom.platform.world.rates import rate_bit_per_s

BAND_HZ = 1e7
RANK = 16


def numbers(seed):
    return np.random.Generator(np.random.PCG64(seed))


def fading_snr_hz(clients, seed):
    """Return p h / N0 of clients in a cell of 500 m, at 23 dBm and under Rayleigh fading."""
    draw = numbers(seed)
    path_loss_db = 128.1 + 37.6 * np.log10(0.5 * np.sqrt(draw.uniform(4e-4, 1, clients)))
    return 10 ** ((23 - path_loss_db + 174) / 10) * draw.exponential(size=clients)


def band(snr_hz, bandwidth_hz=BAND_HZ):
    clients = len(snr_hz)
    nothing = np.zeros(clients)
    return Channel(
        snr_hz=np.asarray(snr_hz, dtype=float),
        bandwidth_hz=bandwidth_hz,
        uplink_bit_per_s=rate_bit_per_s(bandwidth_hz / clients, snr_hz),
        downlink_bit_per_s=np.full(clients, np.inf),
        delay_up_s=nothing,
        delay_down_s=nothing,
    )


def links(bit_per_s, delay_up_s=0.0):
    rates = np.asarray(bit_per_s, dtype=float)
    return Channel(
        snr_hz=None,
        bandwidth_hz=None,
        uplink_bit_per_s=rates,
        downlink_bit_per_s=np.full(len(rates), np.inf),
        delay_up_s=np.full(len(rates), delay_up_s),
        delay_down_s=np.zeros(len(rates)),
    )


def conditions(channel, seed=0, **given):
    """Return the conditions of a round over a channel; without further word, clients differ in everything."""
    draw = numbers(seed)
    clients = len(channel.uplink_bit_per_s)
    examples = draw.integers(10, 100, clients)
    importance = draw.uniform(0.2, 1.8, clients)
    values = {
        "round": 1,
        "rank": RANK,
        "budgets": tuple(Budget(rank=int(rank)) for rank in draw.choice([4, 8, 16], clients)),
        "before_upload_s": draw.uniform(0.1, 0.5, clients),
        "fixed_bits": np.full(clients, 5e3),
        "factor_bits": np.full(clients, 32.0 * RANK * 12 * 1536),
        "weights": examples / examples.sum(),
        "importance": importance / importance.mean(),
        "deadline_s": None,
    }
    return Conditions(channel=channel, **{**values, **given})


def ratios_of(plan):
    return np.array([budget.ratio for budget in plan.budgets])


def finishes_s(plan, shown):
    """Return when each client of a planned round has finished, from the whole ranks that it sends."""
    kept = np.array([max(1, int(budget.ratio * shown.rank + 1e-9)) for budget in plan.budgets])
    rates = shown.channel.uplink_bit_per_s
    if plan.bandwidth_hz is not None:
        rates = rate_bit_per_s(plan.bandwidth_hz, shown.channel.snr_hz)
    bits = shown.fixed_bits + kept / shown.rank * shown.factor_bits
    with np.errstate(divide="ignore"):
        return shown.before_upload_s + shown.channel.delay_up_s + bits / rates


def latency_s(plan, shown):
    """Return when the last client has finished."""
    return float(finishes_s(plan, shown).max())
