"""Controllers by name, what holds for all of them, and the two that look no further than the round."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conditions import BAND_HZ, RANK, band, conditions, fading_snr_hz, latency_s, links, ratios_of
from pydantic import ValidationError

from fedloom.methods.controllers import largest_ratios, whole_ranks
from fedloom.platform.client import Budget
from fedloom.platform.errors import ExperimentError
from fedloom.platform.world.controller import (
    build_controller,
    controller_class,
    controller_names,
    controller_option_names,
)

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
OPTIONS = {"fixed": {"ratio": 0.4}, "greedy_deadline": {"deadline_s": 2.0}, "tsfa": {"latency_limit_s": 2.0}}
CHANNELS = {
    "band": band(fading_snr_hz(7, seed=3)),
    "links": links([1e6, 2e6, 3e6, 4e6, 5e6, 6e6, 7e6], delay_up_s=0.05),
    "ideal": links([np.inf] * 7),
}
everywhere = pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
everyone = pytest.mark.parametrize("name", controller_names())


def planned(name, shown, options=None):
    controller = build_controller(name, OPTIONS[name] if options is None else options)
    return controller.plan(controller.begin(), shown)


@everywhere
@everyone
def test_ratios_are_whole_ranks_that_the_client_bears(name, channel):
    shown = conditions(channel)
    kept = ratios_of(planned(name, shown)) * RANK

    assert (kept == np.round(kept)).all()
    assert (kept >= 1).all()
    assert (kept <= [budget.rank for budget in shown.budgets]).all()


@everywhere
@everyone
def test_the_ranks_of_the_budgets_are_kept(name, channel):
    shown = conditions(channel)

    assert [b.rank for b in planned(name, shown).budgets] == [b.rank for b in shown.budgets]


@everywhere
@everyone
def test_no_more_than_the_band_is_given_away(name, channel):
    shares = planned(name, conditions(channel)).bandwidth_hz
    if shares is None:
        return

    assert channel.bandwidth_hz is not None
    assert (shares > 0).all()
    assert shares.sum() <= BAND_HZ * (1 + 1e-12)


@everywhere
@everyone
def test_a_plan_is_a_function_of_its_arguments(name, channel):
    shown = conditions(channel)
    first, again = planned(name, shown), planned(name, shown)

    assert first.budgets == again.budgets
    assert first.facts == again.facts
    assert np.array_equal(first.bandwidth_hz, again.bandwidth_hz)


@everyone
def test_states_and_facts_are_json(name):
    controller = build_controller(name, OPTIONS[name])
    state = controller.observe(controller.begin(), 3.5)

    assert json.loads(json.dumps(state)) == state
    assert all(type(fact) is float for fact in planned(name, conditions(CHANNELS["band"])).facts.values())


@everyone
def test_every_option_is_documented(name):
    assert all(f"        {option}: " in controller_class(name).__doc__ for option in controller_option_names(name))
    assert all(f"`{option}`" in (PAGES / "tsfa.md").read_text() for option in controller_option_names(name))


def test_names_and_options_are_found():
    assert {"fixed", "greedy_deadline", "tsfa"} <= set(controller_names())
    assert controller_option_names("tsfa") == [field.name for field in fields(controller_class("tsfa"))]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(
        ExperimentError, match=r"key controller\.name: no controller called 'tfsa'.*'tsfa'.*greedy_dead"
    ):
        build_controller("tfsa", {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed", {"ratio": 0.0}),
        ("fixed", {"ratio": 1.1}),
        ("greedy_deadline", {"deadline_s": 0.0}),
        ("tsfa", {}),
        ("tsfa", {"latency_limit_s": 0.0}),
        ("tsfa", {"latency_limit_s": float("inf")}),
        ("tsfa", {"latency_limit_s": 1.0, "tradeoff": 0.0}),
        ("tsfa", {"latency_limit_s": 1.0, "min_ratio": 0.0}),
        ("tsfa", {"latency_limit_s": 1.0, "importance": "equal"}),
        ("tsfa", {"latency_limit_s": 1.0, "V": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValidationError):
        build_controller(name, options)


def test_what_a_client_bears_is_its_ratio_or_its_rank():
    budgets = (Budget(rank=4), Budget(rank=16), Budget(rank=4, ratio=0.5), Budget(rank=16, ratio=0.3))
    shown = conditions(links([1e6] * 4), budgets=budgets)

    assert (largest_ratios(shown) * RANK).tolist() == [4, 16, 8, 4]


def test_every_ratio_of_whole_ranks_gives_them_back():
    """Methods take int(ratio * r + 1e-9), or the same from r * ratio."""
    for rank in (1, 3, 7, 10, 49, 64, 256):
        ranks = np.arange(1, rank + 1)
        ratios = ranks / rank

        assert (whole_ranks(ratios, rank) == ranks).all()
        assert all(int(ratio * rank + 1e-9) == kept for ratio, kept in zip(ratios, ranks, strict=True))
    assert whole_ranks(np.array([0.0, 0.99, 0.5]), 10).tolist() == [1, 9, 5]


def test_fixed_leaves_budgets_and_band_alone():
    shown = conditions(CHANNELS["band"])
    plan = planned("fixed", shown, {})

    assert plan.budgets == shown.budgets
    assert plan.bandwidth_hz is None


def test_fixed_gives_everybody_who_bears_it_the_same_ratio():
    budgets = (Budget(rank=4), Budget(rank=16), Budget(rank=4, ratio=0.5))

    assert (ratios_of(planned("fixed", conditions(links([1e6] * 3), budgets=budgets))) * RANK).tolist() == [4, 6, 6]


@pytest.mark.parametrize("channel", [CHANNELS["band"], links(np.geomspace(1e6, 1e8, 7), 0.4)], ids=["band", "links"])
@pytest.mark.parametrize("deadline_s", [1.0, 3.0, 10.0])
def test_greedy_sends_as_many_ranks_as_the_deadline_lets_through(channel, deadline_s):
    """By trying them all."""
    shown = conditions(channel)
    kept = ratios_of(planned("greedy_deadline", shown, {"deadline_s": deadline_s})) * RANK
    ranks = np.arange(1, RANK + 1)[:, None]
    bits = shown.fixed_bits + ranks / RANK * shown.factor_bits
    finish_s = shown.before_upload_s + channel.delay_up_s + bits / channel.uplink_bit_per_s
    fitting = np.maximum(1, (finish_s <= deadline_s).sum(axis=0))

    assert kept.tolist() == np.minimum(fitting, [budget.rank for budget in shown.budgets]).tolist()


def test_greedy_shares_the_band_equally():
    assert planned("greedy_deadline", conditions(CHANNELS["band"])).bandwidth_hz == pytest.approx(BAND_HZ / 7)


def test_greedy_is_never_late_by_rounding():
    """Deadlines at which some number of ranks just fits, computed in every order of rounding."""
    shown = conditions(links([1e6 / 3] * 5), budgets=(Budget(rank=RANK),) * 5)
    for kept in range(1, RANK + 1):
        bits = shown.fixed_bits + kept / RANK * shown.factor_bits
        exact = float((shown.before_upload_s + bits / shown.channel.uplink_bit_per_s).max())
        for deadline_s in (exact, np.nextafter(exact, 0), np.nextafter(exact, 9e9), exact * (1 - 1e-11)):
            plan = planned("greedy_deadline", shown, {"deadline_s": deadline_s})
            assert latency_s(plan, shown) <= deadline_s or ratios_of(plan).min() * RANK == 1


def test_greedy_takes_the_deadline_of_the_cohort_unless_it_has_its_own():
    shown = conditions(CHANNELS["links"], deadline_s=2.5)
    own = planned("greedy_deadline", shown, {"deadline_s": 1.5})

    assert (
        planned("greedy_deadline", shown, {}).budgets
        == planned("greedy_deadline", replace(shown, deadline_s=None), {"deadline_s": 2.5}).budgets
    )
    assert own.budgets == planned("greedy_deadline", replace(shown, deadline_s=None), {"deadline_s": 1.5}).budgets
    assert own.facts["mean_ratio"] == pytest.approx(ratios_of(own).mean())


def test_greedy_without_any_deadline_says_so():
    with pytest.raises(ExperimentError, match=r"controller\.deadline_s.*Set controller\.deadline_s or cohort"):
        planned("greedy_deadline", conditions(CHANNELS["links"]), {})
