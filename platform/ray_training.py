"""The training of one cohort by a crew of client actors, folded by the server's actor as updates arrive."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedloom.platform.population import Chunk
from fedloom.platform.ray_crew import CALLS_IN_FLIGHT, Call, Crew, Faults, Job, Slot
from fedloom.platform.ray_server import ask, was_made
from fedloom.platform.record import Record

CALL_BYTES = 2**20  # of updates that a call of several chunks returns at most: beyond it copies cost more than calls


class CohortTraining:
    """What waits to be trained, what was trained, and what the server is still to fold.

    Every actor has two calls at most. Where there are many more chunks than actors, the first calls take several, so
    that Ray's own time per call is paid less often. Chunks stay what is folded, so that the bits know nothing of calls,
    nor of actors that die.
    """

    def __init__(self, chunks: Sequence[Chunk], server: Any, crew: Crew, *, update_bytes: int) -> None:
        """``update_bytes``: of the largest update that is to be expected; 0 where nothing is known."""
        self._server = server
        self._crew = crew
        self._chunks_per_call = CALL_BYTES // update_bytes if update_bytes else 1
        self._queues = {slot.pool: deque(c for c in chunks if c.pool == slot.pool) for slot in crew.slots}
        self._records: dict[int, list[Record]] = {}
        self._folds: dict[Any, list[Chunk]] = {}
        self._retries = dict.fromkeys((chunk.index for chunk in chunks), 0)

    def run(self, faults: Faults) -> list[Record]:
        """Train and fold every chunk; returns the clients' records in chunk order.

        Raises:
            ServerLostError: the server is gone.
            RoundError: there are more faults than allowed, or a pool has no actor and gets none.
        """
        job = Job(
            take=self._take,
            finished=self._finished,
            returned=lambda call: self._again(call.work),
            left=lambda pool: bool(self._queues[pool]),
        )
        while True:
            self._crew.work(job, faults)
            unfolded = [work for fold, work in self._folds.items() if not was_made(fold)]
            if not unfolded:
                break
            self._folds.clear()  # updates whose node was lost on their way to the server
            for work in unfolded:
                faults.count("infrastructure", "updates were lost with their node")
                self._again(work)
        return [
            replace(record, retries=self._retries[index]) if self._retries[index] else record
            for index in sorted(self._records)
            for record in self._records[index]
        ]

    def _take(self, slot: Slot) -> Call[list[Chunk]] | None:
        """Submit a call of a fair share of half of what waits, within ``CALL_BYTES``, at least one chunk."""
        queue = self._queues[slot.pool]
        share = len(queue) // (CALLS_IN_FLIGHT * len(self._crew.of(slot.pool)))
        taken = [queue.popleft() for _ in range(min(len(queue), max(1, min(share, self._chunks_per_call))))]
        if not taken:
            return None
        sent = self._server.dispatch_all.remote(taken)
        partials, done = slot.actor.train_all.options(num_returns=2).remote(sent)
        return Call(slot=slot, generation=slot.generation, work=taken, done=done, partials=partials, node=slot.node)

    def _finished(self, call: Call[list[Chunk]], value: list[list[Record]]) -> None:
        indices = [chunk.index for chunk in call.work]
        self._folds[self._server.fold_all.remote(indices, call.partials)] = call.work
        for index, done in zip(indices, value, strict=True):
            self._records[index] = [replace(record, node=call.node) for record in done]

    def _again(self, work: list[Chunk]) -> None:
        ask(self._server, "ping")  # if the server is gone, there is nobody to do it again for
        for chunk in work:
            self._retries[chunk.index] += 1
        self._queues[work[0].pool].extendleft(reversed(work))
