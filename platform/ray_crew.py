"""Client actors that are given work until it is done, through the death of any of them.

A fault never changes a result: what an actor had taken goes back to where it was and is done again, by whoever is free,
with the same seeds. What the faults of a run may come to is limited, so that a machine that kills every actor ends it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray

from fedloom.platform.errors import GroupLostError, RoundError
from fedloom.platform.experiment import FaultSection
from fedloom.platform.population import Resources

START_PATIENCE_S = 300.0
CALLS_IN_FLIGHT = 2  # the next call's dispatches are made while an actor still trains
Work = TypeVar("Work")

# An actor, its process, its node or what it was to read is gone.
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # killed by Ray's memory monitor; no kind of RayActorError
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    GroupLostError,  # the actor is there, but not the processes that it had to work for it
)


@dataclass(eq=False)
class Slot:
    """A place for one actor; ``generation`` counts the actors that it has had, ``node`` is where the last one lives."""

    pool: Resources
    actor: Any = None
    ready: bool = False
    node: str = ""
    generation: int = 0
    calls: int = 0
    since_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Work]):
    """Work that an actor has taken: ``done`` is the reference to wait for, ``partials`` what stays on the cluster."""

    slot: Slot
    generation: int
    work: Work
    done: Any
    partials: Any = None
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Work]):
    """Work for a crew.

    Attributes:
        take: submit a slot's next call, or return ``None`` where nothing is left for its pool.
        finished: what to do with a call's value.
        returned: put a lost call's work back, from where it will be taken again.
        left: whether something is left to take for a pool.
    """

    take: Callable[[Slot], Call[Work] | None]
    finished: Callable[[Call[Work], Any], None]
    returned: Callable[[Call[Work]], None]
    left: Callable[[Resources], bool]


@dataclass
class Faults:
    """What has gone wrong in a run so far, by kind, against what it may come to."""

    allowed: FaultSection
    counts: dict[str, int] = field(default_factory=lambda: {"infrastructure": 0, "out_of_memory": 0})

    def count(self, kind: str, reason: str) -> None:
        """Count one more.

        Raises:
            RoundError: that is more than the experiment allows.
        """
        self.counts[kind] += 1
        if self.counts[kind] > getattr(self.allowed, kind):
            raise RoundError(
                f"fault {self.counts[kind]} of kind {kind!r}, and faults.{kind} allows {getattr(self.allowed, kind)}: "
                f"{reason}"
            )


class Crew:
    """The client actors of all pools."""

    def __init__(self, start: Callable[[Resources], Any], counts: Mapping[Resources, int]) -> None:
        """Start ``counts[pool]`` actors in each pool; ``start`` makes one."""
        self._start = start
        self._starting: dict[Any, Slot] = {}  # actors that have not answered yet, by the reference of their answer
        self.slots = [Slot(pool) for pool, count in counts.items() for _ in range(count)]
        for slot in self.slots:
            self._fill(slot)

    def of(self, pool: Resources) -> list[Slot]:
        """Return the slots of a pool."""
        return [slot for slot in self.slots if slot.pool == pool]

    def close(self) -> None:
        """Kill all actors."""
        for slot in self.slots:
            ray.kill(slot.actor, no_restart=True)
        self.slots = []

    def work(self, job: Job[Work], faults: Faults) -> None:
        """Keep every actor busy until nothing is left and nothing is on its way.

        Raises:
            RoundError: there are more faults than allowed, or a pool has no actor and gets none.
            Exception: whatever the work itself has raised.
        """
        busy: dict[Any, Call[Work]] = {}

        def submit(slots: Sequence[Slot]) -> None:
            for _ in range(CALLS_IN_FLIGHT):
                for slot in slots:
                    if slot.ready and slot.calls < CALLS_IN_FLIGHT and (call := job.take(slot)) is not None:
                        slot.since_s = slot.since_s if slot.calls else time.monotonic()
                        slot.calls += 1
                        busy[call.done] = call

        for slot in self.slots:
            slot.calls = 0
        submit(self.slots)
        while busy or any(job.left(slot.pool) for slot in self._starting.values()):
            ready, _ = ray.wait(
                [*busy, *self._starting], num_returns=1, timeout=self._patience_s(faults.allowed, bool(busy))
            )
            if not ready:
                self._kill_hanging(faults.allowed, bool(busy))
            elif ready[0] in self._starting:
                submit(self._arrived(ready[0], faults))
            else:
                call = busy.pop(ready[0])
                lost, value = _outcome(call.done)
                self._account(call)
                if lost is None:
                    job.finished(call, value)
                else:
                    job.returned(call)
                    self._replace(call.slot, call.generation, lost, faults)
                submit(self.of(call.slot.pool) if lost is not None else [call.slot])

    def _fill(self, slot: Slot) -> None:
        slot.actor, slot.ready, slot.calls = self._start(slot.pool), False, 0
        self._starting[slot.actor.__ray_call__.remote(_node)] = slot

    def _arrived(self, reference: Any, faults: Faults) -> list[Slot]:
        """Take in an actor that has answered, or replace one that has died before it could."""
        slot = self._starting.pop(reference)
        lost, node = _outcome(reference)
        if lost is not None:
            self._replace(slot, slot.generation, lost, faults)
            return []
        slot.ready, slot.node = True, node
        return [slot]

    def _account(self, call: Call[Any]) -> None:
        slot = call.slot
        if slot.generation == call.generation:
            slot.calls -= 1
            slot.since_s = time.monotonic()

    def _replace(self, slot: Slot, generation: int, lost: BaseException, faults: Faults) -> None:
        """Put a new actor in the place of one that is gone; its other calls fail too and do not count again."""
        if slot.generation != generation:
            return
        if getattr(lost, "actor_init_failed", False):
            raise RoundError(f"a client actor could not be started: {_last_line(lost)}") from lost
        kind = "out_of_memory" if isinstance(lost, ray.exceptions.OutOfMemoryError) else "infrastructure"
        faults.count(kind, f"a client actor was lost: {' '.join(str(lost).split())[:300]}")
        ray.kill(slot.actor, no_restart=True)
        slot.generation += 1
        self._fill(slot)

    def _patience_s(self, allowed: FaultSection, busy: bool) -> float | None:
        """Return how long to wait until some call is overdue, or a pool without an actor is given up."""
        if not busy:
            return START_PATIENCE_S
        if allowed.timeout_s is None:
            return None
        began = [slot.since_s for slot in self.slots if slot.calls]
        return max(0.0, min(began, default=time.monotonic()) + allowed.timeout_s - time.monotonic())

    def _kill_hanging(self, allowed: FaultSection, busy: bool) -> None:
        """Kill the actors whose call is overdue; their calls then fail like those of any lost actor."""
        if not busy:
            raise RoundError(
                f"no client actor has started within {START_PATIENCE_S:g} s; the cluster has too little left for "
                f"{dict(next(iter(self._starting.values())).pool)}"
            )
        now = time.monotonic()
        for slot in self.slots:
            if slot.calls and allowed.timeout_s is not None and now - slot.since_s >= allowed.timeout_s:
                slot.since_s = now
                ray.kill(slot.actor, no_restart=True)


def _node(_: Any) -> str:
    """Return the name of the node on which an actor lives: the one that it was given, or its address."""
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeName"]) for node in ray.nodes() if node["NodeID"] == own)


def _last_line(error: BaseException) -> str:
    """Return what an actor's own exception says, without the traceback that Ray puts before it."""
    return str(error).strip().splitlines()[-1].removeprefix("fedloom.platform.errors.")


def _outcome(reference: Any) -> tuple[BaseException | None, Any]:
    """Return what was lost, if anything, and else the value; what the work itself has raised is raised."""
    try:
        return None, ray.get(reference)
    except LOST as error:
        return error, None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LOST):
            return error.cause, None
        raise error.cause from error
