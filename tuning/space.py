"""From a search space to points: which values a trial has, and what experiment that makes."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedloom.platform.errors import ExperimentError, nearest
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import validated
from fedloom.platform.registry import option_names
from fedloom.platform.seeds import generator_for
from fedloom.platform.world.controller import controller_option_names
from fedloom.tuning.sweep_file import Choices, Range, Space, Sweep

if TYPE_CHECKING:
    import optuna

Point = Mapping[str, Any]  # a value for each dotted key
SCALARS = (str, int, float, bool)
# Keys under which others stand that only some of their values have.
NAMED: dict[str, Callable[[str], list[str]]] = {"method": option_names, "controller": controller_option_names}


def shown_point(point: Point) -> str:
    """Return a point in one line: ``method.name=florist method.tau=0.9``."""
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in point.items()}
    return " ".join(f"{key}={word}" for key, word in words.items())


def experiment_at(base: Mapping[str, Any], point: Point, *, place: str) -> Experiment:
    """Return the experiment with the values of a point.

    Args:
        base: the experiment that all trials share, as JSON values.
        point: what this one has of its own; names come before their options.
        place: named in errors.

    Raises:
        ExperimentError: a key or a value is wrong.
    """
    overrides = [f"{key}={json.dumps(point[key])}" for key in ordered(point)]
    return validated(base, place=place, overrides=overrides)


def ordered(keys: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return keys with names before the options that belong to them."""
    return sorted(keys, key=lambda key: (not (key.endswith(".name") or key in NAMED), list(keys).index(key)))


def points_of(sweep: Sweep, base: Mapping[str, Any]) -> list[Point]:
    """Return the points of a grid or of independent draws, each once, in the order of the file."""
    keys = ordered(sweep.space)
    if sweep.search.kind == "grid":
        domains = [_choices(sweep.space[key]) for key in keys]
        drawn = [dict(zip(keys, values, strict=True)) for values in itertools.product(*domains)]
    else:
        drawn = [_drawn(sweep.space, keys, sweep.search.seed, index) for index in range(sweep.search.trials or 0)]
    reduced = [{key: value for key, value in point.items() if has_key(key, point, base)} for point in drawn]
    return list({json.dumps(point, sort_keys=True): point for point in reduced}.values())


@dataclass(frozen=True, slots=True)
class Suggest:
    """A space in Optuna's define-by-run form; a value, so that Ray Tune can keep it with its state.

    Attributes:
        space: the domains by key.
        base: the experiment that all trials share, as JSON values.
    """

    space: Space
    base: Mapping[str, Any]

    def __call__(self, trial: "optuna.Trial") -> None:
        """Ask for a value of every key that has a meaning beside those before it."""
        point: dict[str, Any] = {}
        for key in ordered(self.space):
            if has_key(key, point, self.base):
                point[key] = _suggested(trial, key, self.space[key])


def check_scalars(space: Space) -> None:
    """Refuse lists of what Optuna cannot tell apart.

    Raises:
        ExperimentError: it names the key and the value.
    """
    for key, domain in space.items():
        odd = [] if isinstance(domain, Range) else [value for value in domain if not isinstance(value, SCALARS)]
        if odd:
            raise ExperimentError(
                f"space.{key}: {json.dumps(odd[0])[:80]} is no number, text or truth value, and Optuna takes no other. "
                "Search a grid or at random, or name single keys."
            )


def has_key(key: str, point: Point, base: Mapping[str, Any]) -> bool:
    """Whether a key has a meaning at a point: ``method.tau`` only where the method has such an option."""
    section, _, option = key.partition(".")
    if section not in NAMED or option in {"", "name"}:
        return True
    return option.partition(".")[0] in NAMED[section](_named(section, point, base))


def check_conditions(space: Space, base: Mapping[str, Any]) -> None:
    """Refuse options that nothing in the space has.

    Raises:
        ExperimentError: it names the key and the nearest right one.
    """
    for key in space:
        section, _, option = key.partition(".")
        if section not in NAMED or option in {"", "name"}:
            continue
        names = _names(section, space, base)
        known = sorted({each for name in names for each in NAMED[section](name)})
        if option.partition(".")[0] not in known:
            raise ExperimentError(
                f"space.{key}: no such option of {', '.join(names)}.{nearest(option, known)} "
                f"Known: {', '.join(known) or 'none'}."
            )


def names_of(space: Space, base: Mapping[str, Any]) -> list[Point]:
    """Return every combination of the names in a space, e.g. of methods; one empty point where it has none."""
    keys = [key for key in ordered(space) if (key.endswith(".name") and key.partition(".")[0] in NAMED) or key in NAMED]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(_choices(space[k]) for k in keys))]


def bounds_of(domain: Choices | Range) -> tuple[Any, ...]:
    """Return the values at which a domain is checked: all of a list, both ends of a range."""
    if isinstance(domain, Range):
        ends = (domain.low, domain.high)
        return tuple(int(end) for end in ends) if domain.integer else ends
    return domain


def _names(section: str, space: Space, base: Mapping[str, Any]) -> list[str]:
    """Return every name that a section can have in a space."""
    if f"{section}.name" in space:
        return [str(name) for name in _choices(space[f"{section}.name"])]
    if section in space:
        return [str(value["name"]) for value in _choices(space[section]) if isinstance(value, Mapping)]
    return [_named(section, {}, base)]


def _named(section: str, point: Point, base: Mapping[str, Any]) -> str:
    if f"{section}.name" in point:
        return str(point[f"{section}.name"])
    whole = point.get(section, base[section])
    return str(whole["name"])


def _choices(domain: Choices | Range) -> tuple[Any, ...]:
    return () if isinstance(domain, Range) else domain


def _drawn(space: Space, keys: Sequence[str], seed: int, index: int) -> dict[str, Any]:
    """Draw one point; what a key gets does not depend on which other keys there are."""
    point = {}
    for key in keys:
        share = float(torch.rand((), generator=generator_for(seed, "sweep", index, key), dtype=torch.float64))
        point[key] = _at(space[key], share)
    return point


def _at(domain: Choices | Range, share: float) -> Any:
    """Return the value at a share in [0, 1) of a domain."""
    if not isinstance(domain, Range):
        return domain[int(share * len(domain))]
    if domain.integer and not domain.log:
        return int(domain.low) + int(share * (domain.high - domain.low + 1))
    if domain.log:
        low, high = math.log(domain.low), math.log(domain.high)
        value = math.exp(low + share * (high - low))
        return round(value) if domain.integer else value
    return domain.low + share * (domain.high - domain.low)


def _suggested(trial: "optuna.Trial", key: str, domain: Choices | Range) -> Any:
    if not isinstance(domain, Range):
        return trial.suggest_categorical(key, domain)
    if domain.integer:
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)
