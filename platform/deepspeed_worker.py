"""A client's machine whose clients are trained by several processes under DeepSpeed.

It answers the calls of a :class:`~fedloom.platform.worker.ClientWorker` and does nothing itself: every process of its
group gets every call and is such a worker, and the answer is the first one's. All of them are children of this process
and end with it. One that dies or hangs ends the group at once, and the call raises what a lost actor raises. An error
in training ends it too, since the others wait; a new group then trains the chunk without that client.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedloom.platform.base_model import ModelSpec, tokenizer_of
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.deepspeed_build import check_installed, ensure_built
from fedloom.platform.deepspeed_rank import COLLECTIVE_LIMIT_S, Answer, Failure, RankSetup
from fedloom.platform.errors import GroupLostError
from fedloom.platform.evaluation import Score
from fedloom.platform.population import Group
from fedloom.platform.record import Record
from fedloom.platform.sent import SentChunk
from fedloom.platform.tasks.answers import TaskScore
from fedloom.platform.tasks.questions import TaskShard
from fedloom.platform.updates import Refusal
from fedloom.platform.wire import Packet

START_LIMIT_S = 600.0
_RANK = "from fedloom.platform.deepspeed_rank import main; main()"  # not -m: its classes must be found by their name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    process: subprocess.Popen[bytes]
    pipe: Connection


class _TrainingError(Exception):
    """A client's training has raised an error in a process, and the group was ended."""

    def __init__(self, client: str, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.client = client
        self.refusal = refusal


def _variables(threads: int) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(threads),
        # glibc keeps what weights leave behind, layer by layer, unless what is as large as they goes back at once.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }


class DeepSpeedWorker:
    """A group of processes on one machine that trains one client after the other."""

    def __init__(
        self,
        spec: ModelSpec,
        data: FederatedData,
        *,
        group: Group,
        device: str,
        threads: int,
        fetch: Callable[[Any], Packet] = lambda reference: reference,
    ) -> None:
        """Start the processes; each loads the base model.

        Args:
            spec: how to build the base model.
            data: what clients train on.
            group: how many processes there are, and DeepSpeed's options.
            device: ``cpu`` or ``cuda``.
            threads: that the processes share.
            fetch: turns what a chunk carries in place of a shared packet into the packet.

        Raises:
            MachineError: DeepSpeed is not installed here, or its C++ part cannot be compiled.
            GroupLostError: a process did not come up.
        """
        check_installed()
        library = str(ensure_built()) if device == "cpu" else None
        self._fetch = fetch
        self._spec = spec
        self._ranks: list[_Rank] = []
        self._setup = RankSetup(
            spec=spec,
            data=data,
            rank=0,
            workers=group.workers,
            device=device,
            threads=max(1, threads // group.workers),
            options=json.loads(group.options),
            meeting="",
            library=library,
        )
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedloom-group-")
        self._life = os.pipe()  # whose second end this process alone holds
        setup = replace(self._setup, meeting=str(Path(self._folder.name) / "meeting"))
        try:
            for rank in range(setup.workers):
                self._ranks.append(self._started(replace(setup, rank=rank)))
            self._answers(START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _started(self, setup: RankSetup) -> _Rank:
        ours, theirs = Pipe()
        life = self._life[0]
        with theirs, open(self._said(setup.rank), "wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", _RANK, str(theirs.fileno()), str(life)],
                env=os.environ | _variables(setup.threads),
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for the process that ends the group
            )
        ours.send(setup)
        return _Rank(process=process, pipe=ours)

    def pids(self) -> list[int]:
        """Return the processes of the group."""
        return [rank.process.pid for rank in self._ranks]

    def use(self, data: FederatedData) -> None:
        """Train on other data from now on."""
        self._setup = replace(self._setup, data=data)
        self._asked("use", data)

    def initial_head(self, seed: int) -> Packet:
        """Return the head before round 0, see :meth:`AdapterHost.initial_head`."""
        head: Packet = self._asked("initial_head", seed)
        return head

    def train(self, chunk: SentChunk) -> tuple[Packet, list[Record]]:
        """Train the clients of a chunk, see :meth:`ClientWorker.train`."""
        whole = replace(
            chunk,
            payloads=tuple(self._packet(given) for given in chunk.payloads),
            pieces=tuple(self._packet(given) for given in chunk.pieces),
        )
        failed: dict[str, Refusal] = {}
        while True:
            try:
                trained: tuple[Packet, list[Record]] = self._asked("train", whole, failed)
                return trained
            except _TrainingError as failure:
                failed[failure.client] = failure.refusal
                self._start()

    def train_all(self, chunks: Sequence[SentChunk]) -> tuple[list[Packet], list[list[Record]]]:
        """Train several chunks, see :meth:`ClientWorker.train_all`."""
        done = [self.train(chunk) for chunk in chunks]
        return [partial for partial, _ in done], [records for _, records in done]

    def score(self, adapter: Packet, indices: np.ndarray, batch_size: int) -> Score:
        """Score one shard of the held-out split."""
        score: Score = self._asked("score", adapter, indices, batch_size)
        return score

    def answer(
        self, adapter: Packet, shard: TaskShard, batch_size: int, tokenizer: Callable[[], Any] | None
    ) -> TaskScore:
        """Answer one shard of a task; its processes load the tokenizer from files, as the model."""
        own = None if tokenizer is None else partial(tokenizer_of, self._spec)
        score: TaskScore = self._asked("answer", adapter, shard, batch_size, own)
        return score

    def close(self) -> None:
        """End all processes of the group."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.wait()
            rank.pipe.close()
        self._ranks = []
        for end in self._life:
            os.close(end)
        self._life = ()  # type: ignore[assignment]
        self._folder.cleanup()

    def _packet(self, given: Any) -> Packet:
        return given if isinstance(given, Packet) else self._fetch(given)

    def _asked(self, name: str, *arguments: Any) -> Any:
        """Let all processes do the same; returns what it gave, or raises what it raised, in the first one."""
        if not self._ranks:
            raise GroupLostError("the processes that train a client together are gone")
        try:
            for rank in self._ranks:
                rank.pipe.send((name, arguments))
        except OSError as error:
            self._lost(f"one has ended: {error}")
        first = self._answers()[0]
        if first.error is not None:
            raise first.error
        return first.value

    def _answers(self, limit_s: float | None = None) -> list[Answer]:
        """Wait for all processes. Once one has answered, the others have as long as a step together may take."""
        found: dict[int, Answer] = {}
        until_s = None if limit_s is None else time.monotonic() + limit_s
        while len(found) < len(self._ranks):
            waiting = {rank.pipe: number for number, rank in enumerate(self._ranks) if number not in found}
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            ready = wait(list(waiting), left_s)
            if not ready:
                self._lost(f"process {min(waiting.values())} has not answered in time")
            for pipe in ready:
                number = waiting[pipe]  # type: ignore[index]
                try:
                    found[number] = self._ranks[number].pipe.recv()
                except (EOFError, OSError):
                    self._lost(f"process {number} has ended: {self._last_words(number)}")
            self._check({number: answer.failed for number, answer in found.items() if answer.failed is not None})
            if limit_s is None:
                until_s = until_s or time.monotonic() + COLLECTIVE_LIMIT_S
        return [found[number] for number in range(len(self._ranks))]

    def _check(self, failures: Mapping[int, Failure]) -> None:
        """End the group if a process has given up. What another one says that waited for it counts less."""
        for failure in failures.values():
            if failure.refusal is not None:
                self.close()
                raise _TrainingError(failure.client, failure.refusal)
        for number, failure in failures.items():
            self._lost(f"process {number}: {failure.reason}")

    def _lost(self, reason: str) -> NoReturn:
        self.close()
        raise GroupLostError(f"the group of processes that train a client together was lost; {reason}")

    def _said(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"

    def _last_words(self, rank: int) -> str:
        self._ranks[rank].process.wait()
        lines = [line for line in self._said(rank).read_text(errors="replace").splitlines() if line.strip()]
        code = self._ranks[rank].process.returncode
        return f"exit status {code}{f', after {lines[-1][:300]!r}' if lines else ''}"
