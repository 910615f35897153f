"""Who is reachable in a round: an on/off process for each client, or a trace of absences and presences.

The process is a Markov chain of two states. An absence ends with probability 1 / ``mean_off_rounds`` in every round,
and a presence with such a probability that the long-run share of rounds in which the client is reachable is its
profile's ``availability``. It starts in that long-run state. Each round draws one number for every client, in the order
of the population, from a generator named by the round: so a round's state depends on the seed alone.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fedloom.platform.client import Client
from fedloom.platform.errors import ExperimentError, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import Profile
from fedloom.platform.seeds import seed_for

COLUMNS = ["client", "from_round", "to_round"]
Intervals = Mapping[str, Sequence[tuple[int, float]]]


class Availability(Protocol):
    """Who can be reached, round by round."""

    def reachable(self, number: int) -> np.ndarray:
        """Return for every client, in the order of the population, whether round ``number`` can reach it: bool (N,)."""


class Always:
    """Everybody, always."""

    def __init__(self, num_clients: int) -> None:
        self._everybody = np.ones(num_clients, dtype=bool)

    def reachable(self, number: int) -> np.ndarray:
        """Return True for everybody."""
        return self._everybody


class OnOff:
    """The on/off process. It steps from round to round; asked for an earlier one, it starts again."""

    def __init__(self, seed: int, share: np.ndarray, mean_off_rounds: np.ndarray) -> None:
        """Prepare; ``share`` and ``mean_off_rounds`` have shape (N,)."""
        self._seed = seed
        self._share = share
        self._comes = np.where(share > 0, 1 / mean_off_rounds, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._leaves = np.where(share > 0, (1 - share) / share * self._comes, 1.0)
        self._number = 0
        self._state = np.zeros(len(share), dtype=bool)

    def reachable(self, number: int) -> np.ndarray:
        """Return the state in round ``number``, counted from 1."""
        if number < self._number or self._number == 0:
            self._number, self._state = 1, self._draws(1) < self._share
        while self._number < number:
            self._number += 1
            draws = self._draws(self._number)
            self._state = np.where(self._state, draws >= self._leaves, draws < self._comes)
        return self._state

    def _draws(self, number: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(seed_for(self._seed, "availability", number)))
        return generator.random(len(self._share))


class Trace:
    """Intervals of rounds from a file. A client that the file names is away in rounds that none of its lines covers."""

    def __init__(self, clients: Sequence[Client], intervals: Intervals) -> None:
        """Sort the intervals of all clients into flat arrays."""
        self._known = np.array([client.id not in intervals for client in clients], dtype=bool)
        lines = [
            (position, first, last)
            for position, client in enumerate(clients)
            for first, last in intervals.get(client.id, ())
        ]
        table = np.array(lines, dtype=np.float64).reshape(-1, 3)
        self._positions, self._first, self._last = table[:, 0].astype(np.int64), table[:, 1], table[:, 2]

    def reachable(self, number: int) -> np.ndarray:
        """Return whom a line covers, and whom the file does not name."""
        state = self._known.copy()
        state[self._positions[(self._first <= number) & (number <= self._last)]] = True
        return state


def availability_of(experiment: Experiment, clients: Sequence[Client]) -> Availability:
    """Return the availability that the experiment describes.

    Raises:
        ExperimentError: the trace cannot be read or is wrong, or no process has a profile's numbers.
    """
    population = experiment.population
    if population.availability_trace is not None:
        path = Path(population.availability_trace)
        return Trace(clients, _read_trace(path, {client.id for client in clients}))
    for profile in population.profiles:
        _check_process(profile)
    if all(profile.availability == 1 for profile in population.profiles):
        return Always(len(clients))
    profiles = {profile.name: profile for profile in population.profiles}
    share = np.array([profiles[client.profile].availability for client in clients])
    mean_off_rounds = np.array([profiles[client.profile].mean_off_rounds for client in clients])
    return OnOff(experiment.seed, share, mean_off_rounds)


def _check_process(profile: Profile) -> None:
    share = profile.availability
    if share == 0 or (1 - share) / share <= profile.mean_off_rounds:
        return
    least = (1 - share) / share
    raise ExperimentError(
        f"key population.profiles: profile {profile.name!r} is reachable in {share:g} of the rounds, so its absences "
        f"last {least:.4g} rounds on average at the least. Set mean_off_rounds to at least {least:.4g}, or raise "
        "availability."
    )


def _read_trace(path: Path, ids: set[str]) -> dict[str, list[tuple[int, float]]]:
    place = f"key population.availability_trace, {path}"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExperimentError(f"{place}: cannot be read: {error}") from error
    if not rows or [name.strip() for name in rows[0]] != COLUMNS:
        raise ExperimentError(f"{place}: the first line must be {','.join(COLUMNS)}")
    intervals: dict[str, list[tuple[int, float]]] = {}
    for line, row in enumerate(rows[1:], start=2):
        if row:
            client, first, last = _interval(row, f"{place}, line {line}", ids)
            intervals.setdefault(client, []).append((first, last))
    return intervals


def _interval(row: Sequence[str], place: str, ids: set[str]) -> tuple[str, int, float]:
    if len(row) != len(COLUMNS):
        raise ExperimentError(f"{place}: {len(row)} values; the columns are {', '.join(COLUMNS)}")
    client, first, last = (value.strip() for value in row)
    if client not in ids:
        raise ExperimentError(f"{place}: no client is called {client!r}.{nearest(client, ids)}")
    try:
        begin, end = int(first), float("inf") if last == "" else int(last)
    except ValueError as error:
        raise ExperimentError(f"{place}: {first!r} and {last!r} must be round numbers") from error
    if begin < 1 or end < begin:
        raise ExperimentError(f"{place}: rounds are counted from 1 and from_round <= to_round, not {first} to {last}")
    return client, begin, end
