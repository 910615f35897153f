"""A sweep: one experiment, a search space over its keys, and how to search it.

::

    name: knobs
    experiment: demo                     # a preset or a file
    set: {rounds: 12}                    # keys that are the same for every trial
    space:
      method.name: [fslora, florist]
      method.tau: [0.8, 0.9, 0.99]       # only where the method has it
      training.learning_rate: {low: 0.001, high: 0.1, log: true}
      seed: [0, 1, 2]
    search: {kind: random, trials: 20}
    scheduler: {kind: asha, grace: 2}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedloom.platform.errors import ExperimentError, clipped
from fedloom.platform.experiment_file import explained, read_document
from fedloom.platform.experiment_world import Count, Positive, PositiveFloat, Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # it is a folder's name too


class Range(Section):
    """Numbers between two bounds, both included."""

    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value")
    log: bool = Field(False, description="equal ratios are equally likely, in place of equal differences")
    integer: bool = Field(False, description="whole numbers alone")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, not {self.low:g}")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"integer needs whole bounds, not {self.low:g} and {self.high:g}")
        return self


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]
Space = Mapping[str, Choices | Range]


class SearchSection(Section):
    """Which points of the space become trials."""

    kind: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination; independent draws; Optuna's TPE, also for two objectives"
    )
    trials: Positive | None = Field(None, description="number of trials of random and optuna")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws")

    @model_validator(mode="after")
    def _number(self) -> Self:
        if (self.kind == "grid") != (self.trials is None):
            wanted = "tries every combination; leave trials away" if self.kind == "grid" else "needs trials, e.g. 20"
            raise ValueError(f"search.kind {self.kind!r} {wanted}")
        return self


class Objective(Section):
    """A metric of the runs, and which way is better."""

    metric: str = Field("eval/accuracy", description="of the last round in which it was measured")
    mode: Literal["max", "min"] = Field("max", description="which way is better")


class SchedulerSection(Section):
    """Which trials are stopped, or changed, before their last round."""

    kind: Literal["none", "asha", "median", "pbt"] = Field(
        "none", description="successive halving; below the median of the others; population-based training"
    )
    time: Literal["round", "sim/seconds"] = Field("round", description="by what trials are compared")
    grace: PositiveFloat = Field(1, description="rounds, or simulated seconds, before which nothing is stopped")
    reduction_factor: float = Field(3, gt=1, description="asha: one in so many goes on at each rung")
    interval: PositiveFloat = Field(2, description="pbt: rounds, or simulated seconds, between two changes")


class TrialSection(Section):
    """What a trial may use, and how often it is tried again."""

    actors: Positive = Field(1, description="client actors in each pool of a trial; results do not depend on it")
    concurrent: Positive | None = Field(None, description="trials at once; by default as many as the cluster holds")
    retries: Count = Field(2, description="how often a trial that failed is taken up again, from its last round")
    warm: bool = Field(True, description="hand the actors that hold the base model from one trial to the next")


class Sweep(Section):
    """A whole sweep."""

    name: str = Field(pattern=NAME, description="also of its folder and of its parent run")
    experiment: str = Field("demo", description="a YAML file, or the name of a preset")
    set: Mapping[str, Any] = Field({}, description="dotted keys of the experiment and their values")
    space: Space = Field(min_length=1, description="dotted keys; a list of values, or low and high")
    search: SearchSection = SearchSection()
    objectives: tuple[Objective, ...] = Field(
        (Objective(),), min_length=1, description="what trials are compared by; the first one orders the table"
    )
    scheduler: SchedulerSection = SchedulerSection()
    trials: TrialSection = TrialSection()
    register_as: str | None = Field(
        None, pattern=NAME, description="name in MLflow's model registry for the best trial's adapter"
    )

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        ranges = [key for key, domain in self.space.items() if isinstance(domain, Range)]
        if self.search.kind == "grid" and ranges:
            raise ValueError(f"space.{ranges[0]} is a range, and a grid needs a list of values; or search at random")
        twice = sorted(self.space.keys() & self.set.keys())
        if twice:
            raise ValueError(f"{twice[0]} stands under set and under space; it can be in one of them")
        if len(self.objectives) > 1 and self.scheduler.kind != "none":
            raise ValueError(
                f"scheduler.kind {self.scheduler.kind!r} ranks trials by one objective, and there are "
                f"{len(self.objectives)}; leave one, or the scheduler away"
            )
        if self.scheduler.kind == "pbt" and self.search.kind == "optuna":
            raise ValueError("scheduler.kind 'pbt' searches by itself; search.kind must be grid or random")
        if self.scheduler.kind == "pbt" and self.trials.concurrent is not None:
            raise ValueError("trials.concurrent: with scheduler.kind 'pbt' all trials take turns; leave it away")
        return self


def load_sweep(path: Path) -> Sweep:
    """Read and validate a sweep's file.

    Raises:
        ExperimentError: the file, a key or a value is wrong.
    """
    place = clipped(path.name)
    try:
        return Sweep.model_validate(read_document(path))
    except ValidationError as error:
        raise ExperimentError(explained(error, Sweep, place)) from error
