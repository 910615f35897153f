"""The solver of TSFA: the laws of a round's problem, and its optimum against brute force."""

from dataclasses import replace

import numpy as np
import pytest
from conditions import BAND_HZ, RANK, fading_snr_hz, numbers

from fedloom.methods.tsfa_band import Load, finish_times
from fedloom.methods.tsfa_solver import GRIDS, Terms, solve_band, solve_links
from fedloom.platform.world.rates import rate_bit_per_s

QUEUES = (0.0, 0.03, 0.3, 1.0, 3.0, 30.0)  # over what makes all the worth equal to the whole span of theta
V = 2.0
seeds = pytest.mark.parametrize("seed", range(6))


def load_of(clients, seed):
    """Return clients that differ in everything."""
    draw = numbers(seed)
    return Load(
        start_s=draw.uniform(0.1, 0.5, clients),
        fixed_bits=draw.uniform(0, 1e5, clients),
        factor_bits=draw.uniform(0.5, 2, clients) * 1e7,
        lowest=np.full(clients, 1 / RANK),
        highest=draw.choice([0.25, 0.5, 1.0], clients),
        worth=draw.dirichlet(np.full(clients, 3.0)),
    )


def solved(load, snr_hz, queue_s, tradeoff=V):
    return solve_band(load, Terms(tradeoff=tradeoff, queue_s=queue_s), snr_hz=snr_hz, bandwidth_hz=BAND_HZ)


def span(load, snr_hz):
    """Return theta_min and theta_max."""
    bits = np.stack([load.bits(load.lowest), load.bits(load.highest)])
    return finish_times(bits, load.start_s, snr_hz=snr_hz, bandwidth_hz=BAND_HZ)


def queue_for(load, snr_hz, factor):
    earliest, latest = span(load, snr_hz)
    return factor * V * load.worth.sum() / (latest - earliest)


def cost(load, solution, queue_s):
    return V * load.worth @ (1 - solution.ratios) + queue_s * solution.theta_s


def brute_force(load, snr_hz, queue_s, *, cuts, times):
    """Return the least cost over all ways to cut the band into multiples of 1/cuts, and over a grid of theta."""
    earliest, latest = span(load, snr_hz)
    parts = np.arange(1, cuts)
    if len(snr_hz) == 2:
        shares = np.stack([parts, cuts - parts], axis=1)
    else:
        first, second = np.meshgrid(parts, parts)
        shares = np.stack([first, second, cuts - first - second], axis=-1).reshape(-1, 3)
        shares = shares[shares[:, 2] > 0]
    rates = rate_bit_per_s(shares * BAND_HZ / cuts, snr_hz)
    best = np.inf
    for theta in np.linspace(earliest, latest, times):
        ratios = np.minimum(((theta - load.start_s) * rates - load.fixed_bits) / load.factor_bits, load.highest)
        costs = V * (1 - ratios) @ load.worth + queue_s * theta
        best = min(best, costs[(ratios >= load.lowest).all(axis=1)].min(initial=np.inf))
    return best


# What holds for every solution


@seeds
@pytest.mark.parametrize("clients", [1, 2, 5, 40])
@pytest.mark.parametrize("factor", QUEUES)
def test_the_constraints_hold(clients, seed, factor):
    load, snr_hz = load_of(clients, seed), fading_snr_hz(clients, seed)
    solution = solved(load, snr_hz, queue_for(load, snr_hz, factor))
    finish_s = load.start_s + load.bits(solution.ratios) / rate_bit_per_s(solution.bandwidth_hz, snr_hz)

    assert solution.feasible
    assert solution.bandwidth_hz.sum() <= BAND_HZ
    assert (solution.ratios >= load.lowest).all()
    assert (solution.ratios <= load.highest).all()
    assert finish_s.max() <= solution.theta_s * (1 + 1e-12)


@seeds
def test_nobody_with_ranks_to_send_waits_and_no_band_is_left_over(seed):
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    solution = solved(load, snr_hz, queue_for(load, snr_hz, 1.0))
    finish_s = load.start_s + load.bits(solution.ratios) / rate_bit_per_s(solution.bandwidth_hz, snr_hz)

    assert finish_s == pytest.approx(solution.theta_s, rel=1e-9)
    assert solution.bandwidth_hz.sum() == pytest.approx(BAND_HZ, rel=1e-9)


@seeds
def test_an_empty_queue_sends_everything(seed):
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    solution = solved(load, snr_hz, 0.0)

    assert solution.ratios.tolist() == load.highest.tolist()
    assert solution.theta_s == span(load, snr_hz)[1]


@seeds
def test_a_long_queue_sends_the_least(seed):
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    solution = solved(load, snr_hz, 1e9)

    assert solution.ratios == pytest.approx(load.lowest, rel=1e-9)
    assert solution.theta_s == span(load, snr_hz)[0]


@seeds
def test_a_longer_queue_makes_rounds_shorter(seed):
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    thetas = [solved(load, snr_hz, queue_for(load, snr_hz, factor)).theta_s for factor in np.geomspace(0.03, 30, 25)]

    # The last grid's step is below 1e-5 of the first: two optima that fall together may be that far apart.
    assert (np.diff(thetas) <= 1e-5 * (thetas[0] - thetas[-1])).all()
    assert thetas[0] > 1.2 * thetas[-1]


@seeds
def test_a_larger_tradeoff_sends_more(seed):
    """Of what it is worth in sum: the trade of theta against that is what V decides."""
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    queue_s = queue_for(load, snr_hz, 1.0)
    sent = [load.worth @ solved(load, snr_hz, queue_s, tradeoff).ratios for tradeoff in np.geomspace(0.05, 50, 25)]

    assert (np.diff(sent) >= -1e-5).all()
    assert sent[-1] > 1.5 * sent[0]


@seeds
def test_what_matters_is_the_queue_over_the_tradeoff(seed):
    load, snr_hz = load_of(8, seed), fading_snr_hz(8, seed)
    queue_s = queue_for(load, snr_hz, 1.0)
    solution, doubled = solved(load, snr_hz, queue_s), solved(load, snr_hz, 2 * queue_s, 2 * V)

    assert doubled.ratios.tolist() == solution.ratios.tolist()


def test_equal_clients_get_equal_shares_and_ratios():
    load = Load(
        start_s=np.full(7, 0.3),
        fixed_bits=np.full(7, 1e4),
        factor_bits=np.full(7, 1e7),
        lowest=np.full(7, 1 / RANK),
        highest=np.ones(7),
        worth=np.full(7, 1 / 7),
    )
    snr_hz = np.full(7, 3e7)
    for factor in QUEUES:
        solution = solved(load, snr_hz, queue_for(load, snr_hz, factor))
        assert solution.bandwidth_hz == pytest.approx(BAND_HZ / 7, rel=1e-9)
        assert np.ptp(solution.ratios) <= 1e-12


def test_clients_in_another_order_get_the_same():
    load, snr_hz = load_of(9, seed=1), fading_snr_hz(9, seed=1)
    order = numbers(2).permutation(9)
    moved = Load(**{name: getattr(load, name)[order] for name in Load.__dataclass_fields__})
    queue_s = queue_for(load, snr_hz, 1.0)

    assert solved(moved, snr_hz[order], queue_s).ratios == pytest.approx(
        solved(load, snr_hz, queue_s).ratios[order], rel=1e-9
    )


# The optimum


@pytest.mark.parametrize(("clients", "cuts", "times"), [(2, 4000, 800), (3, 150, 300)])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@seeds
def test_the_solver_finds_what_brute_force_finds(clients, cuts, times, factor, seed):
    """Brute force tries feasible points only, so that it cannot be below the minimum but by rounding.

    The solver may be above it by what the last grid leaves open, Z times 5e-6 of the span of theta. How far brute
    force is above is set by its own grids: a step of theta costs at most Z span / times, and a client's share that is
    one cut off costs part of what the band's last cut is worth. 2% of V covers both.
    """
    load, snr_hz = load_of(clients, seed), fading_snr_hz(clients, seed)
    queue_s = queue_for(load, snr_hz, factor)
    earliest, latest = span(load, snr_hz)
    ours = cost(load, solved(load, snr_hz, queue_s), queue_s)
    theirs = brute_force(load, snr_hz, queue_s, cuts=cuts, times=times)

    assert ours <= theirs + queue_s * (latest - earliest) * 5e-6
    assert theirs <= ours + 0.02 * V


@seeds
def test_no_small_change_of_the_shares_is_better(seed):
    """For 30 clients, where brute force does not reach: bits of band moved between any two at the same theta."""
    load, snr_hz = load_of(30, seed), fading_snr_hz(30, seed)
    solution = solved(load, snr_hz, queue_for(load, snr_hz, 1.0))

    def sent(shares):
        ratios = (
            (solution.theta_s - load.start_s) * rate_bit_per_s(shares, snr_hz) - load.fixed_bits
        ) / load.factor_bits
        possible = (ratios >= load.lowest * (1 - 1e-12)).all()
        return load.worth @ np.minimum(ratios, load.highest) if possible else -np.inf

    best = sent(solution.bandwidth_hz)
    for giver in range(30):
        for taker in range(30):
            moved = solution.bandwidth_hz.copy()
            step = 1e-3 * moved[giver]
            moved[giver] -= step
            moved[taker] += step
            assert sent(moved) <= best + 1e-9


@seeds
@pytest.mark.parametrize("factor", QUEUES)
def test_links_of_their_own_are_solved_exactly(seed, factor):
    """The cost is piecewise linear in theta: the least is at a corner, or at an end of the span."""
    load = load_of(12, seed)
    rates = numbers(seed).uniform(1e6, 2e7, 12)
    begins, ends = (load.start_s + load.bits(ratios) / rates for ratios in (load.lowest, load.highest))
    queue_s = factor * V / (ends.max() - begins.max())
    solution = solve_links(load, Terms(tradeoff=V, queue_s=queue_s), rate_bit_per_s=rates)

    corners = np.concatenate([begins, ends])
    thetas = corners[(corners >= begins.max()) & (corners <= ends.max())][:, None]
    ratios = np.clip(((thetas - load.start_s) * rates - load.fixed_bits) / load.factor_bits, load.lowest, load.highest)
    least = (V * (1 - ratios) @ load.worth + queue_s * thetas[:, 0]).min()

    assert cost(load, solution, queue_s) == pytest.approx(least, rel=1e-9)
    assert (load.start_s + load.bits(solution.ratios) / rates).max() <= solution.theta_s * (1 + 1e-12)
    assert begins.max() <= solution.theta_s <= ends.max()


def test_a_long_queue_sends_the_least_over_links_too():
    """Also where nobody can have sent everything by the time at which all can have sent the least."""
    load = load_of(4, seed=0)
    rates = load.bits(load.lowest) / (2.0 - load.start_s)
    solution = solve_links(load, Terms(tradeoff=V, queue_s=1e9), rate_bit_per_s=rates)

    assert solution.theta_s == pytest.approx(2.0)
    assert solution.ratios == pytest.approx(load.lowest)


def test_links_without_limit_send_everything():
    load = load_of(4, seed=0)
    solution = solve_links(load, Terms(tradeoff=V, queue_s=1e9), rate_bit_per_s=np.full(4, np.inf))

    assert solution.ratios.tolist() == load.highest.tolist()
    assert solution.theta_s == load.start_s.max()


@pytest.mark.parametrize("clients", [1, 3])
def test_a_client_of_no_worth_still_gets_what_is_free(clients):
    load, snr_hz = load_of(clients, seed=4), fading_snr_hz(clients, seed=4)
    idle = replace(load, worth=np.zeros(clients))

    assert solved(idle, snr_hz, 0.0).ratios.tolist() == load.highest.tolist()
    assert np.isfinite(solved(idle, snr_hz, 1.0).bandwidth_hz).all()


def test_channels_of_very_unequal_strength():
    """Twelve decades between the best and the worst channel."""
    load = load_of(5, seed=2)
    snr_hz = np.array([1e12, 1e9, 1e6, 1e3, 1.0])
    for factor in QUEUES:
        solution = solved(load, snr_hz, queue_for(load, snr_hz, factor))
        finish_s = load.start_s + load.bits(solution.ratios) / rate_bit_per_s(solution.bandwidth_hz, snr_hz)
        assert solution.bandwidth_hz.sum() <= BAND_HZ
        assert finish_s.max() <= solution.theta_s * (1 + 1e-9)


def test_the_grids_end_where_the_tests_say():
    step = 2.0 / (GRIDS[0] - 1)
    for points in GRIDS[1:-1]:
        step *= 2 / (points - 1)

    assert step / (GRIDS[-1] - 1) < 1e-5
