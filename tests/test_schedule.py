"""Optuna looks for the front between two objectives, and repeats with its seed; a population is one, and repeats."""

import random
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial
from small import make_experiment

from fedloom.tuning.schedule import scheduler_of, searcher_of
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


class Controller(SimpleNamespace):
    """What a scheduler sees of Ray Tune: the trials, which it may pause and save."""

    def __init__(self, trials):
        super().__init__(search_alg=None, trials=trials)

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return [trial for trial in self.trials if not trial.is_finished()]

    def pause_trial(self, trial, should_checkpoint):
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial, result):
        return f"state of {trial.trial_id}"


def population(sweep):
    """Return the scheduler of a sweep, and its four trials as a controller has them."""
    scheduler = scheduler_of(sweep, point="point", rounds=9)
    trials = [
        Trial("trial", trial_id=f"t{rate}", config={"point": {"training.learning_rate": rate}}, stub=True)
        for rate in (0.01, 0.02, 0.03, 0.04)
    ]
    controller = Controller(trials)
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    return scheduler, controller


def reported(scheduler, controller, trial, number, loss):
    result = {"round": number, "eval/loss": loss, "training_iteration": number}
    return scheduler.on_trial_result(controller, trial, result)


def chosen(sweep, losses, order):
    """Return what each trial goes on with after each of three rounds, in which they report their losses in an order."""
    scheduler, controller = population(sweep)
    rates = []
    for number in (1, 2, 3):
        for trial in controller.trials:
            trial.status = Trial.RUNNING
        for place in order:
            random.random()  # somebody else's draw
            reported(scheduler, controller, controller.trials[place], number, losses[place])
        rates.append([trial.config["point"]["training.learning_rate"] for trial in controller.trials])
    return rates


def test_the_choices_of_a_population_repeat_whoever_is_quicker():
    """With another seed they are others; Python's own generator goes on as if nothing had been drawn."""
    document = {"name": "s", "experiment": "demo", "space": {"training.learning_rate": RATES}}
    document |= {"objectives": [{"metric": "eval/loss", "mode": "min"}], "scheduler": {"kind": "pbt", "interval": 1}}
    one, other = (
        Sweep.model_validate(document | {"search": {"kind": "random", "trials": 4, "seed": seed}}) for seed in (0, 1)
    )
    losses = [0.4, 0.9, 0.5, 0.6]

    first = chosen(one, losses, order=[0, 1, 2, 3])
    assert first == chosen(one, losses, order=[1, 3, 0, 2])
    assert first != chosen(other, losses, order=[0, 1, 2, 3])
    assert [(best, worst != 0.02) for best, worst, *_ in first] == [(0.01, True)] * 3
    random.seed(5)
    chosen(one, losses, order=[0, 1, 2, 3])
    generator = random.Random(5)
    drawn = [generator.random() for _ in range(13)]  # by the trials' twelve reports, and the next
    assert random.random() == drawn[-1]


@pytest.mark.parametrize("reached", [0, 1, 5])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_population_plays_to_its_end_also_when_it_is_taken_up_again(interval, reached):
    """Whoever comes back at a round to a scheduler that knows nothing of it is let run as often as it takes."""
    document = {"name": "s", "experiment": "demo", "space": {"training.learning_rate": RATES}}
    document |= {"objectives": [{"metric": "eval/loss", "mode": "min"}]}
    document |= {"search": {"kind": "random", "trials": 4}, "scheduler": {"kind": "pbt", "interval": interval}}
    scheduler, controller = population(Sweep.model_validate(document))
    rounds = {trial.trial_id: reached for trial in controller.trials}

    while unfinished := [trial for trial in controller.trials if rounds[trial.trial_id] < 9]:
        trial = scheduler.choose_trial_to_run(controller)
        assert trial in unfinished, rounds
        trial.status = Trial.RUNNING
        while trial.status == Trial.RUNNING:
            rounds[trial.trial_id] += 1
            if rounds[trial.trial_id] == 9:
                trial.status = Trial.TERMINATED
                scheduler.on_trial_complete(controller, trial, {})
            elif reported(scheduler, controller, trial, rounds[trial.trial_id], 0.1) == "PAUSE":
                trial.status = Trial.PAUSED
