"""One process of a group that trains clients together, on two inherited descriptors, named in its arguments.

Over the first calls come and answers go; the second closes when the process that started this one is gone.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.machinery import ExtensionFileLoader
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedloom.platform.base_model import ModelSpec
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.updates import Refusal

COLLECTIVE_LIMIT_S = 300.0  # of one step that all processes take together: beyond it one of them hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What a process is told first.

    Attributes:
        spec: how to build the base model.
        data: what clients train on.
        rank: of this process in the group; ``workers`` are its processes.
        device: ``cpu`` or ``cuda``.
        threads: of this process.
        options: DeepSpeed's JSON.
        meeting: a file in which the processes find one another.
        library: DeepSpeed's compiled part, where there are no GPUs.
    """

    spec: ModelSpec
    data: FederatedData
    rank: int
    workers: int
    device: str
    threads: int
    options: Mapping[str, Any]
    meeting: str
    library: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a process of a group has given up, and the others must: in words, and, if a client was at fault, whose."""

    reason: str
    client: str
    refusal: Refusal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call gave. All but the first process of a group leave the value out."""

    value: Any = None
    error: BaseException | None = None
    failed: Failure | None = None


def main() -> None:
    """Answer calls until the starting process has no more of them."""
    pipe, life = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    connection = Connection(pipe)
    with contextlib.suppress(EOFError):
        setup: RankSetup = connection.recv()
        worker = _worker(setup)
        connection.send(Answer())
        while True:
            name, arguments = connection.recv()
            answer = _answer(worker, name, arguments)
            connection.send(answer if setup.rank == 0 or answer.value is None else Answer())
            if answer.failed is not None:
                break
    # Threads of gloo wait for processes that are ended too: nothing here is worth an orderly end.
    os._exit(0)


def _end_with(life: int) -> None:
    os.read(life, 1)  # returns when the other end is closed, by whatever end of its process
    os._exit(1)


def _answer(worker: Any, name: str, arguments: tuple[Any, ...]) -> Answer:
    from fedloom.platform.deepspeed_trainer import RankFailed

    try:
        return Answer(value=getattr(worker, name)(*arguments))
    except RankFailed as failure:
        return Answer(failed=Failure(reason=str(failure), client=failure.client, refusal=failure.refusal))
    except Exception as error:  # the first process raises it where the call came from
        return Answer(error=error)


def _worker(setup: RankSetup) -> Any:
    device = _join(setup)
    from fedloom.platform.deepspeed_trainer import SharedHost, train_together
    from fedloom.platform.worker import ClientWorker

    return ClientWorker(
        setup.spec,
        setup.data,
        device=device,
        threads=setup.threads,
        make_host=partial(SharedHost, options=setup.options),
        train=train_together,
    )


def _join(setup: RankSetup) -> str:
    """Make this process one of its group; returns its device."""
    import torch

    rank, workers = setup.rank, setup.workers
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_SIZE": str(workers)}
    os.environ |= {"DS_ACCELERATOR": setup.device, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(setup.threads)
    if setup.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if setup.device == "cuda" else "gloo",
        init_method=Path(setup.meeting).as_uri(),
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT_S),
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if setup.library is not None:
        _load(Path(setup.library))
    deepspeed.init_distributed(verbose=False)
    return setup.device if setup.device == "cpu" else f"cuda:{rank}"


def _load(library: Path) -> None:
    """Give DeepSpeed its compiled part, so that it does not begin to compile."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    loader = ExtensionFileLoader(library.stem, str(library))
    found = importlib.util.spec_from_loader(library.stem, loader)
    assert found is not None, "there is a loader"
    module = importlib.util.module_from_spec(found)
    loader.exec_module(module)
    OpBuilder._loaded_ops[library.stem] = module
