"""The experiment's sections on unequal machines: profiles, cohorts, the network, the deadline and the controller."""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from fedloom.platform.experiment_trainer import check_trainer

LARGEST_COUNT = 2**31 - 1
"""Of anything that is counted: what a tensor, an array and Ray can be asked for without an overflow."""
LARGEST_NUMBER = 1e12
"""Of anything that is measured: sums over clients and changes of unit stay finite."""

Positive = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST_NUMBER)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the experiment file: frozen; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(BaseModel):
    """What a catalogue knows by name, with its own options beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """Its own options."""
        return dict(self.model_extra or {})


class RankDistribution(Section):
    """Ranks that are drawn for each client of a profile."""

    values: tuple[Positive, ...] = Field(min_length=1, description="the ranks that occur")
    weights: tuple[PositiveFloat, ...] | None = Field(None, description="relative frequencies; default: equal ones")

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.values):
            raise ValueError(f"rank has {len(self.values)} values but {len(self.weights)} weights; give one for each")
        return self


class Profile(Section):
    """A class of machines: how many clients have it, what they can bear, and what Ray gives their actors."""

    name: str = Field(description="in tables and records; no two profiles have the same")
    share: PositiveFloat | None = Field(None, description="share of the clients, relative to the other shares")
    count: Positive | None = Field(None, description="number of clients; the shares divide the rest")
    rank: Positive | RankDistribution | Literal["auto"] = Field(
        8, description="the largest LoRA rank of such a machine, how it is drawn, or auto: as its memory allows"
    )
    rank_pattern: dict[str, Positive] = Field(
        {}, description="ranks of the modules whose name ends in a match of a regular expression, in place of rank"
    )
    ratio: Ratio | None = Field(
        None, description="share of the global rank to train (FSLoRA) or send (SOFT), in place of rank / global rank"
    )
    num_cpus: PositiveFloat = Field(1.0, description="CPUs of a client actor; its threads are max(1, floor of it)")
    num_gpus: NonNegative = Field(0.0, description="GPUs of a client actor; a fraction shares one")
    memory_gib: PositiveFloat | None = Field(None, description="memory that Ray reserves for a client actor")
    gpu_memory_gib: PositiveFloat | None = Field(None, description="memory on its GPU that a client may fill")
    resources: dict[str, PositiveFloat] = Field({}, description="custom Ray resources of a client actor")
    trainer: Literal["plain", "deepspeed"] = Field(
        "plain", description="what trains a client: one process, or DeepSpeed with several workers"
    )
    workers: Positive = Field(1, description="deepspeed: processes that train one client together, on one machine")
    deepspeed: dict[str, JsonValue] = Field(
        {}, description="deepspeed: options in DeepSpeed's own JSON, e.g. zero_optimization: {stage: 3}"
    )
    compute_gflop_per_s: PositiveFloat | None = Field(
        None, description="sustained speed in training, on the simulated clock; null: training takes no simulated time"
    )
    power_w: PositiveFloat | None = Field(None, description="power drawn while training; with it the ledger has energy")
    uplink_mbit_per_s: PositiveFloat | None = Field(
        None, description="network links: client to server; null: unlimited"
    )
    downlink_mbit_per_s: PositiveFloat | None = Field(
        None, description="network links: server to client; null: unlimited"
    )
    latency_s: NonNegative = Field(0.0, description="network links: added to every transfer")
    jitter_s: NonNegative = Field(0.0, description="network links: mean of an exponential delay of a transfer")
    loss: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="network links: share of the bytes that is lost and sent again"
    )
    availability: Probability = Field(1.0, description="long-run share of rounds in which such a client is reachable")
    mean_off_rounds: Annotated[float, Field(ge=1, le=LARGEST_NUMBER)] = Field(
        1.0, description="mean length of an absence in rounds, of the on/off process"
    )

    @model_validator(mode="after")
    def _share_or_count(self) -> Self:
        if (self.share is None) == (self.count is None):
            raise ValueError(f"profile {self.name!r} needs either share or count, e.g. share: 0.5")
        return self

    @model_validator(mode="after")
    def _automatic_rank(self) -> Self:
        key = "gpu_memory_gib" if self.num_gpus > 0 else "memory_gib"
        if self.rank == "auto" and getattr(self, key) is None:
            raise ValueError(f"profile {self.name!r} has rank 'auto', which follows from {key}; set it, e.g. {key}: 8")
        if self.rank == "auto" and self.rank_pattern:
            raise ValueError(f"profile {self.name!r} has rank 'auto' and a rank_pattern; give it a number as rank")
        return self

    @model_validator(mode="after")
    def _trainer(self) -> Self:
        check_trainer(
            self.name,
            trainer=self.trainer,
            workers=self.workers,
            options=self.deepspeed,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
        )
        return self

    @field_validator("rank_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern in value:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that a client of this profile can have where no pattern says another.

        An automatic rank has been replaced by a number before this is asked.
        """
        return self.rank.values if isinstance(self.rank, RankDistribution) else (int(self.rank),)

    def ranks_in(self, modules: Iterable[str], rank: int) -> dict[str, int]:
        """Return the rank by module of a client with this ``rank``; patterns match as PEFT's, the first one wins."""
        patterns = self.rank_pattern
        return {
            module: next((patterns[key] for key in patterns if module_matches(key, module)), rank) for module in modules
        }


def module_matches(pattern: str, module: str) -> bool:
    """Whether a module's name, or its end after a dot, is a match of the regular expression."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


class PopulationSection(Section):
    """The clients and their machines."""

    profiles: tuple[Profile, ...] = Field(
        (Profile(name="default", share=1.0),), description="the classes of machines, whose shares divide the clients"
    )
    availability_trace: str | None = Field(
        None, description="CSV file with the columns client, from_round and to_round; in place of the on/off process"
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [profile.name for profile in self.profiles]
        if not names:
            raise ValueError("population.profiles is empty; at least one profile is needed")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"population.profiles names {doubled[0]!r} twice; profile names must differ")
        return self


class CohortSection(Section):
    """Who takes part in a round, and until when."""

    size: Positive = Field(8, description="clients that a round wants")
    sampler: Literal["uniform", "by_examples", "by_availability", "stratified"] = Field(
        "uniform", description="of the reachable clients: all alike; by examples; the rarely seen first; by profile"
    )
    over_selection: Annotated[float, Field(ge=1, le=10)] = Field(
        1.0, description="sample this many times as many clients, in case some miss the deadline"
    )
    deadline_s: PositiveFloat | None = Field(None, description="simulated seconds after which an update is left out")
    min_updates: Positive = Field(1, description="a round with fewer accepted updates is handled as on_missing says")
    on_missing: Literal["error", "skip"] = Field(
        "error", description="too few updates: end the run, or record the round and leave the model as it was"
    )

    @property
    def places(self) -> int:
        """How many clients a round samples where enough are reachable."""
        return math.ceil(self.size * self.over_selection - 1e-9)

    @model_validator(mode="after")
    def _quorum(self) -> Self:
        if self.min_updates > self.size:
            raise ValueError(f"cohort.min_updates is {self.min_updates} but a cohort has only {self.size} clients")
        return self


class NetworkSection(Section):
    """How long bytes take on the simulated clock. ``links`` reads the profiles; the other keys are of ``wireless``."""

    kind: Literal["ideal", "links", "wireless"] = Field(
        "ideal", description="nothing takes time; a link of each profile's own; one cell whose band is shared"
    )
    bandwidth_policy: Literal["equal", "proportional", "min_max"] = Field(
        "equal", description="shares of the uplink band where the controller leaves them open"
    )
    bandwidth_mhz: PositiveFloat = Field(10.0, description="uplink band that the clients of a round share (FDMA)")
    transmit_power_dbm: float = Field(23.0, ge=-50, le=80, description="of every client")
    noise_dbm_per_hz: float = Field(-174.0, ge=-250, le=0, description="power spectral density of the noise")
    cell_radius_m: PositiveFloat = Field(500.0, description="clients stand uniformly over the cell's area")
    min_distance_m: PositiveFloat = Field(10.0, description="nobody stands closer to the base station")
    path_loss_at_1_km_db: float = Field(128.1, ge=0, le=400, description="loss at a distance of 1 km")
    path_loss_db_per_decade: float = Field(37.6, ge=0, le=200, description="per tenfold distance")
    fading: Literal["none", "rayleigh", "rician"] = Field("rayleigh", description="drawn anew for every round")
    rician_k_db: float = Field(6.0, ge=-50, le=50, description="rician: direct path over scattered power")
    downlink_mbit_per_s: PositiveFloat | None = Field(None, description="of every client; null: takes no time")

    @model_validator(mode="after")
    def _distances(self) -> Self:
        if self.min_distance_m >= self.cell_radius_m:
            raise ValueError(
                f"network.min_distance_m is {self.min_distance_m:g} but the cell's radius is {self.cell_radius_m:g} m"
            )
        return self


class ControllerSection(NamedSection):
    """What decides the budgets of a round."""

    name: str = Field("fixed", description="`fixed`, `greedy_deadline` or `tsfa`; its options stand beside it")
