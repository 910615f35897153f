"""Local training under DeepSpeed: what each process of the group that trains one client does.

All processes get the same calls and hold the same adapter. They share out the examples of every batch, and, in ZeRO's
stage 3, the base model. What a client trains, on which batches and at which rates is the plain trainer's; only sums
are made in another order, so that the result is the plain trainer's but for rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from fedloom.platform.adapter import Adapter, Factors
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec, checkpointing
from fedloom.platform.data.federated import FederatedData, collate
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.experiment_trainer import stage_of
from fedloom.platform.method import Dispatch
from fedloom.platform.peft_layout import storable
from fedloom.platform.penalties import PENALTIES, Pair
from fedloom.platform.received import ties_of
from fedloom.platform.seeds import seed_for
from fedloom.platform.ties import Tie
from fedloom.platform.trainer import (
    Trained,
    batches,
    num_steps,
    on_device,
    optimizer_of,
    parts_of_rank,
    schedule_of,
    seeded_dropout,
)
from fedloom.platform.updates import refusal_of

PARTED = ZeroParamStatus.NOT_AVAILABLE


class RankFailed(BaseException):
    """Training failed in this process, and the others wait for it in vain: the whole group must end.

    Attributes:
        client: whose training it was.
        refusal: why the client is left out; ``None`` if another process was at fault, and this one waited in vain.
    """

    def __init__(self, client: str, error: Exception) -> None:
        """Tell an error of training from one of the group: gloo's have no class of their own, but name their place."""
        super().__init__(f"client {client!r}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        together = isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)
        self.client = client
        self.refusal = None if together else refusal_of(error)


class SharedHost(AdapterHost):
    """A base model of which each process holds all of it (stages 0 to 2) or a part of every weight (stage 3)."""

    def __init__(self, spec: ModelSpec, *, device: str, options: Mapping[str, Any]) -> None:
        """Load the base model; in stage 3 it is loaded into the CPU's memory and cut up from there.

        Args:
            spec: how to build the model.
            device: of this process.
            options: DeepSpeed's JSON.
        """
        self._options = options
        self._engine: Any = None
        self.sharded = stage_of(options) == 3
        super().__init__(spec, device="cpu" if self.sharded else device)
        if self.sharded:
            self.device = device
            deepspeed.zero.Init(module=self.model, config_dict_or_path=self._configuration())
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(device)

    def initial_head(self, seed: int) -> dict[str, Tensor]:
        """Return the head before round 0, see :meth:`AdapterHost.initial_head`."""
        with self._gathered():
            return super().initial_head(seed)

    def wear(
        self,
        adapter: Adapter,
        *,
        patch: Mapping[str, Factors] | None = None,
        patch_scale: float = 1.0,
        trainable: frozenset[str] = frozenset(),
        ties: Mapping[str, Tie] | None = None,
    ) -> None:
        """Put on an adapter; a cut-up base model is then ready to be called, or, with an optimiser, to be trained."""
        self._release()
        if self.sharded:  # DeepSpeed cannot cut up a factor without numbers
            patch = patch and {name: storable(pair) for name, pair in patch.items()}
            if not trainable:
                factors = {name: storable(pair) for name, pair in adapter.factors.items()}
                adapter = Adapter(factors=factors, head=adapter.head, scale=adapter.scale)
        super().wear(adapter, patch=patch, patch_scale=patch_scale, trainable=trainable, ties=ties)
        if self.sharded and not trainable:
            self._engine, *_ = deepspeed.initialize(model=self.model, config=self._configuration())

    def pairs(self) -> list[Pair]:
        """Return the live (B, A) of every module, for penalties."""
        pairs = super().pairs()
        _make_whole([factor for pair in pairs for factor in pair])
        return pairs

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the trainable head."""
        head = super().head_parameters()
        _make_whole(head)
        return head

    def worn(self, scale: float) -> Adapter:
        """Return the adapter as it is now."""
        with self._gathered():
            return super().worn(scale)

    @contextmanager
    def training(self, settings: TrainingSection, steps: int) -> Iterator[Any]:
        """Yield DeepSpeed's engine for the adapter that is worn."""
        optimizer = optimizer_of(self, settings)
        largest = max(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        self._engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            lr_scheduler=lambda basic: schedule_of(basic, settings, steps),
            config=self._configuration(largest) | {"gradient_clipping": settings.max_grad_norm or 0.0},
        )
        try:
            yield self._engine
        finally:
            self.model.eval()

    def _configuration(self, largest: int = 0) -> dict[str, Any]:
        """Return DeepSpeed's JSON: what was asked for, and that clients are the plain trainer's.

        In stage 3 all that is trained stays whole, for penalties look at it and its size is nothing beside the base's.
        """
        zero = dict(self._options.get("zero_optimization", {}))
        if self.sharded:
            key = "stage3_param_persistence_threshold"
            zero[key] = max(int(zero.get(key, 100_000)), largest)
        return {
            **self._options,
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 1,  # a number that DeepSpeed wants; batches are cut by us
            "zero_allow_untested_optimizer": True,  # SGD
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW, also on the CPU: nothing to compile, the same sums
        }

    def _release(self) -> None:
        """Take the last engine's hooks off the model."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None

    def _gathered(self) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        trained = [factor for pair in self.pairs() for factor in pair] + list(self._head_parameters().values())
        held: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(trained)
        return held


def _make_whole(parameters: Sequence[Any]) -> None:
    """Put together what is trained; before its first step DeepSpeed cuts up again what it is to keep whole."""
    parted = [parameter for parameter in parameters if getattr(parameter, "ds_status", None) is PARTED]
    if parted:
        parted[0].all_gather(parted)


def train_together(
    host: SharedHost,
    data: FederatedData,
    settings: TrainingSection,
    *,
    dispatch: Dispatch,
    received: Adapter,
    patch: Mapping[str, Factors] | None,
    patch_scale: float,
    client: str,
    seed: int,
) -> Trained:
    """Train one client, as :func:`fedloom.platform.trainer.train_client` does, in all processes of the group.

    Raises:
        RankFailed: anything went wrong here; the other processes cannot go on.
    """
    rank = torch.distributed.get_rank()
    # Each process draws dropout for its own examples; the first one draws as the plain trainer does.
    drops = seed if rank == 0 else seed_for(seed, "rank", rank)
    examples = data.clients[client]
    steps = num_steps(examples, settings)
    total = torch.zeros((), device=host.device)
    try:
        ties = ties_of(dispatch, host.shapes)
        host.wear(received, patch=patch, patch_scale=patch_scale, trainable=dispatch.trainable, ties=ties)
        saving = checkpointing(host.model, reentrant=host.sharded) if settings.gradient_checkpointing else nullcontext()
        with seeded_dropout(host.device, drops), saving, host.training(settings, steps) as engine:
            engine.train()
            for indices in batches(examples, settings, seed):
                total += _step(engine, host, collate(data, indices), dispatch, settings)
        torch.distributed.all_reduce(total)
        return Trained(adapter=host.worn(received.scale), loss=float(total) / max(1, steps), steps=steps)
    except Exception as error:
        raise RankFailed(client, error) from error


def _step(
    engine: Any, host: SharedHost, batch: dict[str, Tensor], dispatch: Dispatch, settings: TrainingSection
) -> Tensor:
    total = torch.zeros((), device=host.device)
    world = torch.distributed.get_world_size()
    parts = list(parts_of_rank(batch, torch.distributed.get_rank(), world, settings.micro_batch_size))
    penalty = dispatch.penalty
    if penalty is not None:  # on its own: DeepSpeed bears one gradient of a factor in a pass
        value = penalty.weight * PENALTIES[penalty.name](host.pairs(), **penalty.options)
        for parameter in host.head_parameters():  # what has no gradient in a step's first pass keeps the last step's
            value = value + 0.0 * parameter.sum()
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(value, scale_wrt_gas=False)
        engine.step()
    for number, (part, share) in enumerate(parts, 1):
        loss: Tensor = engine(**on_device(part, host.device)).loss
        engine.set_gradient_accumulation_boundary(number == len(parts))
        # DeepSpeed takes the mean of the processes' gradients.
        engine.backward(world * share * loss, scale_wrt_gas=False)
        engine.step()  # only the last one of a step changes anything
        total += share * loss.detach().float()
    return total
