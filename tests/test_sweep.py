"""Sweeps: which points a space has, what is refused, and when one has ended."""

import math
from collections import Counter
from types import SimpleNamespace

import optuna
import pytest
import yaml
from commands import make_world

from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment_file import read_document
from fedloom.tuning.space import Suggest, experiment_at, has_key, points_of
from fedloom.tuning.sweep import was_cut
from fedloom.tuning.sweep_file import Sweep, load_sweep
from fedloom.tuning.sweep_plan import plan_sweep, trials_at_once

BASE = {"method": {"name": "fedit"}, "controller": {"name": "fixed"}}
METHODS = {"method.name": ["florist", "soft", "fedit"], "method.tau": [0.8, 0.9], "method.keep_ratio": [0.5]}


def sweep_of(space, **sections):
    return Sweep.model_validate({"name": "s", "space": space, **sections})


# Spaces


def test_a_grid_has_every_combination_and_options_only_where_the_method_has_them():
    points = points_of(sweep_of({**METHODS, "seed": [0, 1]}), BASE)
    assert len(points) == (2 + 1 + 1) * 2
    assert all(("method.tau" in point) == (point["method.name"] == "florist") for point in points)
    assert all(("method.keep_ratio" in point) == (point["method.name"] == "soft") for point in points)


def test_points_are_distinct():
    points = points_of(sweep_of({"seed": [0, 1]}, search={"kind": "random", "trials": 20}), BASE)
    assert sorted(point["seed"] for point in points) == [0, 1]


def test_random_points_repeat_with_the_seed_and_one_key_does_not_move_another():
    search = {"kind": "random", "trials": 30, "seed": 7}
    rate = {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    alone = points_of(sweep_of(rate, search=search), BASE)
    assert alone == points_of(sweep_of(rate, search=search), BASE)
    both = points_of(sweep_of({**rate, "adapter.rank": {"low": 2, "high": 9, "integer": True}}, search=search), BASE)
    assert [point["training.learning_rate"] for point in both] == [point["training.learning_rate"] for point in alone]
    other = points_of(sweep_of(rate, search=search | {"seed": 8}), BASE)
    assert alone != other


def test_random_points_stay_within_their_ranges_and_fill_them():
    space = {
        "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "training.momentum": {"low": 0.0, "high": 0.5},
        "adapter.rank": {"low": 2, "high": 5, "integer": True},
    }
    points = points_of(sweep_of(space, search={"kind": "random", "trials": 400}), BASE)
    rates = [math.log10(point["training.learning_rate"]) for point in points]
    assert -4 <= min(rates) < -3.9
    assert -1.1 < max(rates) <= -1
    assert abs(sum(rates) / len(rates) + 2.5) < 0.15  # the middle of the exponents, five standard errors wide
    assert 0 <= min(p["training.momentum"] for p in points) < 0.01
    counts = Counter(point["adapter.rank"] for point in points)
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 60


def test_optuna_is_asked_for_nothing_that_a_method_does_not_have():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    suggest = Suggest(sweep_of(METHODS).space, BASE)
    drawn = []
    for _ in range(30):
        trial = study.ask()
        suggest(trial)
        drawn.append(trial.params)
    assert {point["method.name"] for point in drawn} == {"florist", "soft", "fedit"}
    assert all(has_key(key, point, BASE) for point in drawn for key in point)
    assert all(("method.tau" in point) == (point["method.name"] == "florist") for point in drawn)


def test_a_point_changes_its_keys_and_nothing_else():
    base = {"rounds": 3, "method": {"name": "florist", "tau": 0.7}}
    before = experiment_at(base, {}, place="here").model_dump(mode="json")
    point = {"method.tau": 0.9, "method.name": "florist", "training.learning_rate": 0.5}
    after = experiment_at(base, point, place="here").model_dump(mode="json")
    assert after["method"] == {"name": "florist", "tau": 0.9}
    assert after["training"]["learning_rate"] == 0.5
    assert {key for key in after if after[key] != before[key]} == {"method", "training"}
    # Another method drops the options of the first, in whatever order the keys stand.
    other = experiment_at(base, {"method.keep_ratio": 0.5, "method.name": "soft"}, place="here")
    assert other.method.options == {"keep_ratio": 0.5}


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {}}, "space"),
        ({"name": "../up"}, "name"),
        ({"spce": {}}, "Did you mean 'space'"),
        ({"space": {"training.learning_rate": {"low": 1, "high": 0.1}}}, "low 1 must be below high 0.1"),
        ({"space": {"training.learning_rate": {"low": 0.1, "high": 1}}}, "a grid needs a list"),
        ({"space": {"adapter.rank": {"low": 1.5, "high": 3, "integer": True}}}, "whole bounds"),
        ({"space": {"seed": []}}, "space"),
        ({"set": {"seed": 3}}, "seed stands under set and under space"),
        ({"search": {"kind": "random"}}, "needs trials"),
        ({"search": {"kind": "grid", "trials": 3}}, "leave trials away"),
        (
            {"objectives": [{}, {"metric": "bytes/total", "mode": "min"}], "scheduler": {"kind": "asha"}},
            "one objective",
        ),
        ({"scheduler": {"kind": "asha", "time": "hours"}}, "sim/seconds"),
        ({"search": {"kind": "optuna", "trials": 3}, "scheduler": {"kind": "pbt"}}, "searches by itself"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused_with_the_key(tmp_path, change, said):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "s", "space": {"seed": [0, 1]}, **change}))
    with pytest.raises(ExperimentError, match=r"s\.yaml") as error:
        load_sweep(tmp_path / "s.yaml")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"space": {"method.tua": [0.8]}}, "space.method.tua: no such option of flexlora"),
        ({"space": {"method.name": ["florist"], "method.tua": [0.8]}}, "Did you mean 'tau'"),
        ({"space": {"training.learning_rat": [0.1]}}, "Did you mean 'learning_rate'"),
        ({"space": {"method.name": ["florist"], "method.tau": [0.8, 1.5]}}, "1.5 is not allowed"),
        ({"space": {"cohort.size": [3, 300]}}, "cohort.size=300"),
        ({"space": {"seed": [0]}, "set": {"rounds": 0}}, "rounds"),
        ({"space": {"data": [{"source": "rows.jsonl"}]}, "search": {"kind": "optuna", "trials": 2}}, "space.data"),
        (
            {
                "space": {"training.learning_rate": {"low": -1, "high": 0.1}},
                "search": {"kind": "optuna", "trials": 2},
            },
            "learning_rate",
        ),
        (
            {
                "space": {"cohort.size": [2, 3]},
                "search": {"kind": "random", "trials": 2},
                "scheduler": {"kind": "pbt"},
            },
            "in the middle of a run",
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_starts(tmp_path, monkeypatch, sections, said):
    monkeypatch.chdir(make_world(tmp_path))
    sweep = Sweep.model_validate({"name": "s", "experiment": "mine.yaml", **sections})
    with pytest.raises(ExperimentError) as error:
        plan_sweep(sweep, read_document(tmp_path / "mine.yaml"))
    assert said in str(error.value)


def test_a_sweep_that_never_fits_is_refused_with_the_arithmetic():
    small, large = (("num_cpus", 1.0), ("num_gpus", 0.0)), (("num_cpus", 2.0), ("num_gpus", 0.0))
    total = {"num_cpus": 8.0, "num_gpus": 0.0}
    assert trials_at_once([{small: small}], total, 1) == 8
    assert trials_at_once([{small: small, large: large}], total, 1) == 2
    assert trials_at_once([{small: small}, {large: large}], total, 2) == 2
    with pytest.raises(ExperimentError, match="need num_cpus 9 at once but the cluster has num_cpus 8"):
        trials_at_once([{small: small, large: large}], total, 3)


@pytest.mark.parametrize(
    ("trials", "cut"),
    [
        ([("TERMINATED", True), ("TERMINATED", True), ("ERROR", False)], False),
        ([("TERMINATED", True), ("TERMINATED", False), ("ERROR", False)], True),
        ([("TERMINATED", True), ("RUNNING", False), ("PENDING", None)], True),
        ([("TERMINATED", True), ("TERMINATED", True)], True),
    ],
    ids=["ended", "running when it was cut", "waiting when it was cut", "not yet begun when it was cut"],
)
def test_a_cut_sweep_is_not_taken_for_one_that_has_ended(trials, cut):
    """A trial that ran is called terminated by Tune, and one that waited may be missing from its list."""
    of_tune = [
        SimpleNamespace(status=status, last_result=None if done is None else {"done": done}) for status, done in trials
    ]
    assert was_cut(of_tune, 3) == cut
