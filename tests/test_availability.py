"""Who is reachable: long-run shares and absences of the process, and traces with holes."""

import numpy as np
import pytest

from fedloom.platform.client import Client
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.world.availability import availability_of

ROUNDS = 4000


def clients(number, profile="p"):
    return [Client(id=f"c{i}", profile=profile, rank=2, num_examples=5) for i in range(number)]


def experiment(share=1.0, mean_off_rounds=1.0, *, trace=None, seed=0):
    profile = {"name": "p", "share": 1, "availability": share, "mean_off_rounds": mean_off_rounds}
    return Experiment.model_validate(
        {"seed": seed, "population": {"profiles": [profile], "availability_trace": trace and str(trace)}}
    )


def history(described, population, rounds=ROUNDS):
    availability = availability_of(described, population)
    return np.array([availability.reachable(number) for number in range(1, rounds + 1)])


@pytest.mark.parametrize(("share", "mean_off_rounds"), [(0.9, 1.0), (0.5, 1.0), (0.5, 4.0), (0.25, 3.0), (0.2, 10.0)])
def test_the_long_run_share_and_the_mean_absence_are_the_profile_s(share, mean_off_rounds):
    states = history(experiment(share, mean_off_rounds), clients(50))

    # A round's state resembles the next one's with this correlation, which widens the error of the mean.
    correlation = 1 - 1 / mean_off_rounds - (1 - share) / share / mean_off_rounds
    error = np.sqrt(share * (1 - share) / states.size * (1 + correlation) / (1 - correlation))
    assert abs(states.mean() - share) <= 5 * error
    ends = np.count_nonzero(~states[:-1] & states[1:])
    absences = np.count_nonzero(~states[:-1]) / ends
    assert absences == pytest.approx(mean_off_rounds, rel=5 / np.sqrt(ends))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_some_are_never_there_and_some_always(share):
    assert (history(experiment(share), clients(3), rounds=5) == bool(share)).all()


def test_it_starts_in_the_long_run_state():
    first = [availability_of(experiment(0.3, 5.0, seed=seed), clients(200)).reachable(1).mean() for seed in range(20)]
    assert abs(np.mean(first) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)


def test_a_round_depends_on_the_seed_and_not_on_what_was_asked_before():
    described, population = experiment(0.5, 3.0), clients(30)
    straight = history(described, population, rounds=20)
    jumping = availability_of(described, population)

    assert (jumping.reachable(20) == straight[19]).all()
    assert (jumping.reachable(7) == straight[6]).all()
    assert (history(experiment(0.5, 3.0, seed=1), population, rounds=20) != straight).any()


def test_numbers_that_no_process_has_are_refused_with_the_nearest():
    with pytest.raises(ExperimentError, match=r"profile 'p'.*0.2 of the rounds.*at least 4"):
        availability_of(experiment(0.2, 2.0), clients(2))
    availability_of(experiment(0.2, 4.0), clients(2))


def trace(tmp_path, *lines):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["client,from_round,to_round", *lines]) + "\n")
    return path


def test_rounds_that_no_line_covers_are_absences(tmp_path):
    path = trace(tmp_path, "c0,1,2", "c0,5,", "c1,2,4", "c1,3,6", "")

    states = history(experiment(trace=path), clients(3), rounds=7)

    assert states[:, 0].tolist() == [True, True, False, False, True, True, True]
    assert states[:, 1].tolist() == [False, True, True, True, True, True, False]
    assert states[:, 2].all(), "a client that the file does not name is always there"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c0,1", r"line 2: 2 values"),
        ("c0,one,2", r"line 2: 'one' and '2' must be round numbers"),
        ("c0,0,2", r"line 2: rounds are counted from 1"),
        ("c0,5,4", r"line 2: .*from_round <= to_round"),
        ("c00,1,2", r"line 2: no client is called 'c00'. Did you mean 'c0'\?"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ExperimentError, match=message):
        availability_of(experiment(trace=trace(tmp_path, line)), clients(2))


def test_a_trace_that_is_not_there_or_is_something_else_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be read"):
        availability_of(experiment(trace=tmp_path / "none.csv"), clients(2))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ExperimentError, match="first line must be client,from_round,to_round"):
        availability_of(experiment(trace=tmp_path / "other.csv"), clients(2))
