"""TSFA: rounds that cannot be in time, whole ranks, the queue, and the long run."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from conditions import BAND_HZ, RANK, band, conditions, fading_snr_hz, finishes_s, latency_s, links, ratios_of

from fedloom.methods.tsfa import TSFA
from fedloom.platform.client import Budget
from fedloom.platform.world.rates import bandwidth_for

seeds = pytest.mark.parametrize("seed", range(6))


# Rounds that cannot be in time


@seeds
def test_where_nobody_can_be_in_time_all_send_the_least_as_early_as_they_can(seed):
    shown = conditions(band(fading_snr_hz(6, seed)), seed)
    controller = TSFA(latency_limit_s=0.05)
    early = controller.plan({"queue_s": 1e12}, shown)
    faded = controller.plan({"queue_s": 0.0}, replace(shown, deadline_s=0.1))

    assert early.facts["infeasible"] == 0.0
    assert faded.facts["infeasible"] == 1.0
    assert (ratios_of(faded) == 1 / RANK).all()
    assert latency_s(faded, shown) == pytest.approx(early.facts["theta_s"], rel=1e-9)
    assert faded.bandwidth_hz.sum() <= BAND_HZ
    assert controller.observe({"queue_s": 0.0}, latency_s(faded, shown))["queue_s"] > 0


@seeds
@pytest.mark.parametrize("queue_s", [0.0, 0.5, 1e12])
def test_where_not_all_can_be_in_time_as_many_as_possible_are(seed, queue_s):
    """By trying every set: each client needs some band for its lowest ratio."""
    shown = conditions(band(fading_snr_hz(6, seed)), seed)
    controller = TSFA(latency_limit_s=1.0)
    deadline_s = 0.9 * controller.plan({"queue_s": 1e12}, shown).facts["theta_s"]
    plan = controller.plan({"queue_s": queue_s}, replace(shown, deadline_s=deadline_s))
    on_time = finishes_s(plan, shown) <= deadline_s
    bits = shown.fixed_bits + shown.factor_bits / RANK
    needs = [
        bandwidth_for(size / (deadline_s - start), snr) if start < deadline_s else np.inf
        for size, start, snr in zip(bits, shown.before_upload_s, shown.channel.snr_hz, strict=True)
    ]
    possible = [size for size in range(1, 7) for some in combinations(needs, size) if sum(some) <= 0.999 * BAND_HZ]

    assert plan.facts["infeasible"] == 1.0
    assert on_time.sum() == max(possible)
    assert (ratios_of(plan)[~on_time] == 1 / RANK).all()
    assert finishes_s(plan, shown)[on_time].max() <= plan.facts["theta_s"] * (1 + 1e-9)
    assert plan.bandwidth_hz.sum() <= BAND_HZ
    assert (plan.bandwidth_hz > 0).all()


def test_over_links_only_those_are_given_up_who_cannot_be_in_time():
    shown = conditions(
        links([1e5, 2e6, 4e6, 8e6]), budgets=(Budget(rank=RANK),) * 4, deadline_s=1.0, before_upload_s=np.full(4, 0.2)
    )
    plan = TSFA(latency_limit_s=1.0).plan({"queue_s": 0.0}, shown)

    assert plan.facts["infeasible"] == 1.0
    assert (finishes_s(plan, shown) <= 1.0).tolist() == [False, True, True, True]
    assert (np.diff(ratios_of(plan)[1:]) > 0).all()


@seeds
def test_the_deadline_is_kept_where_it_can_be(seed):
    """To the last digit: an update that is late by rounding is lost."""
    shown = conditions(band(fading_snr_hz(6, seed)), seed)
    controller = TSFA(latency_limit_s=1.0)
    first, last = (controller.plan({"queue_s": queue_s}, shown).facts["theta_s"] for queue_s in (1e12, 0.0))
    for deadline_s in np.linspace(1.001 * first, last, 30):
        plan = controller.plan({"queue_s": 0.0}, replace(shown, deadline_s=deadline_s))
        assert plan.facts["infeasible"] == 0.0
        assert latency_s(plan, shown) <= deadline_s


@pytest.mark.parametrize("channel", [band([1e8, 0.0, 1e8]), links([1e6, 0.0, 1e6])], ids=["band", "links"])
def test_a_client_without_any_channel_is_given_up(channel):
    shown = conditions(channel, budgets=(Budget(rank=RANK),) * 3)
    plan = TSFA(latency_limit_s=1.0).plan({"queue_s": 0.0}, shown)

    assert plan.facts["infeasible"] == 1.0
    assert ratios_of(plan).tolist() == [1.0, 1 / RANK, 1.0]
    assert finishes_s(plan, shown)[[0, 2]].max() <= plan.facts["theta_s"] * (1 + 1e-9)


@pytest.mark.parametrize("channel", [band([0.0, 0.0]), links([0.0, 0.0])], ids=["band", "links"])
def test_a_round_without_any_channel_still_has_a_plan(channel):
    plan = TSFA(latency_limit_s=1.0).plan({"queue_s": 0.0}, conditions(channel))

    assert plan.facts["infeasible"] == 1.0
    assert plan.bandwidth_hz is None or plan.bandwidth_hz == pytest.approx(BAND_HZ / 2)


# The controller


@pytest.mark.parametrize("channel", [band(fading_snr_hz(9, 5)), links(np.geomspace(1e6, 3e7, 9), 0.1)])
@pytest.mark.parametrize("queue_s", [0.0, 0.01, 0.1, 1.0, 1e9])
def test_no_round_takes_longer_than_theta(channel, queue_s):
    shown = conditions(channel)
    plan = TSFA(latency_limit_s=1.0).plan({"queue_s": queue_s}, shown)

    assert latency_s(plan, shown) <= plan.facts["theta_s"] * (1 + 1e-9)
    assert plan.facts["mean_ratio"] == pytest.approx(ratios_of(plan).mean())
    assert plan.facts["queue_s"] == queue_s


def test_the_mean_latency_stays_within_the_limit_in_the_long_run():
    """(1/T) sum T^t <= T_bar + Z^T / T always; and here Z^T / T is small, and the time that is allowed is used."""
    limit_s = 0.8
    controller = TSFA(latency_limit_s=limit_s)
    state, latencies, unlimited = controller.begin(), [], []
    for number in range(1, 151):
        shown = conditions(band(fading_snr_hz(10, 1000 + number)), round=number)
        plan = controller.plan(state, shown)
        latencies.append(latency_s(plan, shown))
        state = json.loads(json.dumps(controller.observe(state, latencies[-1])))
        unlimited.append(latency_s(controller.plan(controller.begin(), shown), shown))
        assert state["queue_s"] >= 0
        assert np.mean(latencies) <= limit_s + state["queue_s"] / number + 1e-12

    assert np.mean(unlimited) > 1.2 * limit_s
    assert 0.9 * limit_s <= np.mean(latencies) <= 1.02 * limit_s


def test_a_round_at_its_limit_leaves_the_queue_as_it_is():
    controller = TSFA(latency_limit_s=2.0)

    assert controller.begin() == {"queue_s": 0.0}
    assert controller.observe({"queue_s": 5.0}, 2.0) == {"queue_s": 5.0}
    assert controller.observe({"queue_s": 5.0}, 3.5) == {"queue_s": 6.5}
    assert controller.observe({"queue_s": 1.0}, 0.5) == {"queue_s": 0.0}


def test_at_least_one_rank_is_sent_and_at_least_the_least_ratio():
    shown = conditions(band(fading_snr_hz(6, 0)))
    bears = np.array([budget.rank for budget in shown.budgets])
    ranks = [
        ratios_of(TSFA(latency_limit_s=1.0, min_ratio=ratio).plan({"queue_s": 1e12}, shown)) * RANK
        for ratio in (None, 0.3, 1.0)
    ]

    assert ranks[0].tolist() == [1] * 6
    assert ranks[1].tolist() == np.minimum(5, bears).tolist()  # 0.3 * 16 = 4.8
    assert ranks[2].tolist() == bears.tolist()


def test_who_has_more_to_say_sends_more():
    """Equal in all but the importance; uniform importance looks away."""
    even = {
        "budgets": (Budget(rank=RANK),) * 4,
        "before_upload_s": np.full(4, 0.2),
        "weights": np.full(4, 0.25),
        "importance": np.array([0.4, 0.8, 1.2, 1.6]),
    }
    shown = conditions(band(np.full(4, 1e8)), **even)
    state = {"queue_s": 1.0}
    by_energy = ratios_of(TSFA(latency_limit_s=1.0).plan(state, shown))
    alike = ratios_of(TSFA(latency_limit_s=1.0, importance="uniform").plan(state, shown))

    assert (np.diff(by_energy) >= 0).all()
    assert by_energy[-1] > by_energy[0]
    assert np.ptp(alike) == 0


def test_links_of_their_own_leave_no_band_to_share():
    plan = TSFA(latency_limit_s=1.0).plan({"queue_s": 0.1}, conditions(links([1e6, 2e6])))

    assert plan.bandwidth_hz is None
