"""Optuna looks for the front between two objectives, and repeats with its seed; a population is one."""

import pytest
from small import make_experiment

from fedloom.tuning.schedule import searcher_of
from fedloom.tuning.sweep_file import Sweep
from fedloom.tuning.trial import point_of

RATES = {"low": 0.001, "high": 0.1, "log": True}
TWO = [{"metric": "eval/accuracy", "mode": "max"}, {"metric": "bytes/total", "mode": "min"}]


def test_optuna_s_front_is_that_of_what_it_was_told(tmp_path):
    """Each trial gets a point of the space; of what came of them, those remain that no other beats in both."""
    document = {"name": "s", "experiment": "demo", "space": {"training.learning_rate": RATES}}
    told = Sweep.model_validate(document | {"search": {"kind": "optuna", "trials": 5}, "objectives": TWO})
    searcher = searcher_of(told, make_experiment(tmp_path))
    ended = {"a": (0.5, 10.0), "b": (0.7, 30.0), "c": (0.4, 20.0), "d": (0.7, 40.0), "e": (0.6, 20.0)}
    rates = []
    for name, (accuracy, size) in ended.items():
        rates.append(point_of(searcher.suggest(name))["training.learning_rate"])
        searcher.on_trial_complete(name, {"eval/accuracy": accuracy, "bytes/total": size})

    front = {tuple(trial.values) for trial in searcher._ot_study.best_trials}
    assert front == {ended["a"], ended["b"], ended["e"]}
    assert all(RATES["low"] <= rate <= RATES["high"] for rate in rates)
    assert len(set(rates)) == len(rates)
    again = searcher_of(told, make_experiment(tmp_path))
    assert point_of(again.suggest("a")) == {"training.learning_rate": rates[0]}


def test_a_population_is_not_cut_into_parts():
    """Trials that are not there when another one is judged would never be taken over."""
    document = {"name": "s", "experiment": "demo", "space": {"training.learning_rate": RATES}}
    document |= {"search": {"kind": "random", "trials": 3}, "scheduler": {"kind": "pbt"}}
    Sweep.model_validate(document)
    with pytest.raises(ValueError, match="all trials take turns"):
        Sweep.model_validate(document | {"trials": {"concurrent": 2}})
