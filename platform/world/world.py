"""One round of the unequal world: who is reachable and sampled, what each may spend, and how long it takes."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedloom.platform.client import Client
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.errors import ExperimentError
from fedloom.platform.experiment import Experiment
from fedloom.platform.method import SEED_BYTES
from fedloom.platform.population import Task, tasks_of
from fedloom.platform.record import Record
from fedloom.platform.registry import method_class, method_names
from fedloom.platform.seeds import seed_for
from fedloom.platform.world.availability import availability_of
from fedloom.platform.world.bandwidth import bandwidth_shares
from fedloom.platform.world.clock import Timing, flop_of, training_tokens
from fedloom.platform.world.controller import Conditions, Plan, build_controller
from fedloom.platform.world.ledger import clock_totals, round_latency_s
from fedloom.platform.world.network import Channel, network_of
from fedloom.platform.world.rates import rate_bit_per_s
from fedloom.platform.world.sampling import cohort_of
from fedloom.platform.world.wireless import watt

VALUE_BITS = 32  # factors travel as float32
SEED_BITS = 8 * SEED_BYTES  # of a sketch


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the clock has to know of the model.

    Attributes:
        data: from which the tokens of a client's batches are counted.
        shapes: (d_out, d_in) by target module.
        base_parameters: weights of the frozen linear layers.
        head_parameters: values of the head that are trained and sent in full.
        rank: the global rank r.
    """

    data: FederatedData
    shapes: Mapping[str, tuple[int, int]]
    base_parameters: int
    head_parameters: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A round before it is trained: its tasks in cohort order, and what the controller wants logged."""

    tasks: tuple[Task, ...]
    facts: Mapping[str, float] = field(default_factory=dict)


class World:
    """The state of the world between rounds: controller, counts of participation, importance, the clock."""

    def __init__(self, experiment: Experiment, clients: Sequence[Client], costs: Costs) -> None:
        """Prepare availability, network and controller; nothing is drawn before a round asks for it.

        Raises:
            ExperimentError: an option of the availability, the network or the controller cannot be had.
        """
        self._experiment = experiment
        self._clients = clients
        self._costs = costs
        self._profiles = {profile.name: profile for profile in experiment.population.profiles}
        self._availability = availability_of(experiment, clients)
        self._network = network_of(experiment, clients)
        self._controller = build_controller(experiment.controller.name, experiment.controller.options)
        if self._controller.steers:
            _check_steerable(experiment)
        self.controller_state: dict[str, Any] = self._controller.begin()
        self._seen: Counter[str] = Counter()
        self._importance: dict[str, float] = {}
        self.seconds = 0.0
        self.has_clock = has_clock(experiment)

    def open(self, number: int) -> Opened:
        """Sample the cohort of round ``number`` and decide its budgets."""
        tasks, reachable = self._sampled(number)
        facts = {"reachable": float(reachable), "cohort": float(len(tasks))}
        if not tasks or not self.has_clock:
            return Opened(tasks=tuple(tasks), facts=facts)
        conditions, timings = self._conditions(number, tasks)
        plan = self._controller.plan(self.controller_state, conditions)
        timed = self._with_uplinks(plan, conditions, timings)
        opened = (
            Task(client=task.client, budget=budget, timing=timing)
            for task, budget, timing in zip(tasks, plan.budgets, timed, strict=True)
        )
        return Opened(
            tasks=tuple(opened), facts=facts | {f"controller/{name}": value for name, value in plan.facts.items()}
        )

    def close(self, records: Sequence[Record]) -> dict[str, float]:
        """Let the round's simulated time pass; returns its totals on the simulated clock, if there is one."""
        if not self.has_clock:
            return {}
        deadline_s = self._experiment.cohort.deadline_s
        latency_s = round_latency_s(records, deadline_s)
        self.seconds += latency_s
        self.controller_state = self._controller.observe(self.controller_state, latency_s)
        self._importance |= {record.client: record.importance for record in records if record.refused is None}
        return clock_totals(records, deadline_s) | {"sim/seconds": self.seconds}

    def progress(self) -> dict[str, Any]:
        """Return, as JSON values, all that later rounds depend on beside the experiment."""
        return {
            "controller": self.controller_state,
            "seen": dict(self._seen),
            "importance": self._importance,
            "seconds": self.seconds,
        }

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Put back what :meth:`progress` has returned."""
        self.controller_state = dict(progress["controller"])
        self._seen = Counter(progress["seen"])
        self._importance = dict(progress["importance"])
        self.seconds = progress["seconds"]

    def conditions(self, number: int) -> Conditions | None:
        """Sample the cohort of round ``number``: what a controller would know, or ``None`` if nobody is there."""
        tasks, _ = self._sampled(number)
        return self._conditions(number, tasks)[0] if tasks else None

    def _sampled(self, number: int) -> tuple[list[Task], int]:
        """Return the cohort's tasks, without a clock, and how many clients are reachable."""
        reachable = self._availability.reachable(number)
        cohort = cohort_of(self._experiment, self._clients, number, reachable, self._seen)
        self._seen.update(client.id for client in cohort)
        return tasks_of(self._experiment, cohort, self._costs.shapes), int(np.count_nonzero(reachable))

    def _conditions(self, number: int, tasks: Sequence[Task]) -> tuple[Conditions, list[Timing]]:
        costs = self._costs
        channel = self._network.channel(number, [task.client for task in tasks])
        per_rank = sum(d_out + d_in for d_out, d_in in costs.shapes.values())
        head_bits, factor_bits = VALUE_BITS * costs.head_parameters, VALUE_BITS * per_rank * costs.rank
        mask_bits = 8 * len(costs.shapes) * math.ceil(costs.rank / 8)
        timings = [self._timing(number, task, channel, index) for index, task in enumerate(tasks)]
        before = [
            (head_bits + factor_bits + SEED_BITS) / timing.downlink_bit_per_s
            + timing.delay_down_s
            + (timing.flop + costs.rank * timing.flop_per_rank) / timing.speed_flop_per_s
            for timing in timings
        ]
        examples = np.array([task.client.num_examples for task in tasks], dtype=np.float64)
        return Conditions(
            round=number,
            channel=channel,
            rank=costs.rank,
            budgets=tuple(task.budget for task in tasks),
            before_upload_s=np.array(before),
            fixed_bits=np.full(len(tasks), float(head_bits + mask_bits)),
            factor_bits=np.full(len(tasks), float(factor_bits)),
            weights=examples / examples.sum(),
            importance=self._importances(tasks),
            deadline_s=self._experiment.cohort.deadline_s,
        ), timings

    def _timing(self, number: int, task: Task, channel: Channel, index: int) -> Timing:
        """Return a client's timing but for the uplink of a shared band, which the plan decides."""
        experiment, costs = self._experiment, self._costs
        profile = self._profiles[task.client.profile]
        seed = seed_for(experiment.seed, "round", number - 1, "client", task.client.id)
        tokens = training_tokens(costs.data, experiment.training, task.client.id, seed)
        flop, flop_per_rank = flop_of(tokens, costs.base_parameters, costs.shapes)
        gflop_per_s = profile.compute_gflop_per_s
        return Timing(
            downlink_bit_per_s=float(channel.downlink_bit_per_s[index]),
            delay_down_s=float(channel.delay_down_s[index]),
            flop=flop,
            flop_per_rank=flop_per_rank,
            speed_flop_per_s=math.inf if gflop_per_s is None else 1e9 * gflop_per_s,
            power_w=profile.power_w or 0.0,
            uplink_bit_per_s=float(channel.uplink_bit_per_s[index]),
            delay_up_s=float(channel.delay_up_s[index]),
            transmit_power_w=0.0 if channel.snr_hz is None else watt(experiment.network.transmit_power_dbm),
            deadline_s=experiment.cohort.deadline_s or math.inf,
        )

    def _with_uplinks(self, plan: Plan, conditions: Conditions, timings: Sequence[Timing]) -> list[Timing]:
        """Give everybody a share of the band: the plan's, else that of the experiment's policy."""
        channel = conditions.channel
        if channel.snr_hz is None:
            return list(timings)
        shares = plan.bandwidth_hz
        if shares is None:
            ratios = np.array([budget.share(conditions.rank) for budget in plan.budgets])
            bits = conditions.fixed_bits + ratios * conditions.factor_bits
            policy = self._experiment.network.bandwidth_policy
            shares = bandwidth_shares(policy, channel, conditions.before_upload_s, bits)
        rates = rate_bit_per_s(shares, channel.snr_hz)
        return [
            replace(timing, uplink_bit_per_s=float(rate), bandwidth_hz=float(share))
            for timing, rate, share in zip(timings, rates, shares, strict=True)
        ]

    def _importances(self, tasks: Sequence[Task]) -> np.ndarray:
        """Return the energy of each client's last update over the mean of those known; 1 for who sent none."""
        known = np.array([self._importance.get(task.client.id, math.nan) for task in tasks])
        mean = np.nanmean(known) if np.isfinite(known).any() else math.nan
        return np.where(np.isfinite(known), known / mean, 1.0) if mean > 0 else np.ones(len(tasks))


def _check_steerable(experiment: Experiment) -> None:
    name = experiment.method.name
    if not method_class(name).traits.has_ratio:
        able = [other for other in method_names() if method_class(other).traits.has_ratio]
        raise ExperimentError(
            f"key controller.name: {experiment.controller.name!r} steers ratios, and the method {name!r} has none. "
            f"Methods that have one: {', '.join(able)}. Or leave controller out."
        )


def has_clock(experiment: Experiment) -> bool:
    """Whether anything in the experiment takes simulated time or depends on it."""
    return (
        experiment.network.kind != "ideal"
        or experiment.controller.name != "fixed"
        or bool(experiment.controller.options)
        or experiment.cohort.deadline_s is not None
        or any(profile.compute_gflop_per_s is not None for profile in experiment.population.profiles)
    )
