"""An experiment: the frozen, validated, hashed description of a run.

Everything that can change a result stands here and enters :attr:`Experiment.hash`. Where it runs (executor, cluster
address, number of actors, tracking server) does not: that is chosen on the command line.
"""

import hashlib
import json
from typing import Literal, Self

from pydantic import Field, model_validator

from fedloom.platform.experiment_data import DataSection, PartitionSection
from fedloom.platform.experiment_tasks import TaskSection
from fedloom.platform.experiment_trainer import stage_of
from fedloom.platform.experiment_world import (
    CohortSection,
    ControllerSection,
    Count,
    Fraction,
    NamedSection,
    NetworkSection,
    NonNegative,
    PopulationSection,
    Positive,
    PositiveFloat,
    Section,
)


class ModelSection(Section):
    """The frozen base model."""

    name: str = Field("builtin:tiny", description="`builtin:tiny`, a Hugging Face id, or a local folder")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="the frozen weights in bitsandbytes' LLM.int8 or NF4; every profile then needs a GPU"
    )


class AdapterSection(Section):
    """The adapters that clients train."""

    rank: Positive | None = Field(None, description="global rank r; by default the method takes it from the profiles")
    scale: PositiveFloat = Field(2.0, description="s in W0 + s B A, one for all ranks (PEFT: alpha / r)")
    targets: tuple[str, ...] | None = Field(None, description="module names; by default PEFT's for the architecture")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")


class TrainingSection(Section):
    """Local training of one client in one round."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="begun anew by each client in each round")
    learning_rate: PositiveFloat = Field(1e-3, description="of the factors")
    head_learning_rate: PositiveFloat | None = Field(None, description="of a classifier head; default: learning_rate")
    weight_decay: NonNegative = Field(0.0, description="of the factors and of a head")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="of the learning rates within a client's round: constant, or linearly to 0"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    batch_size: Positive = Field(16, description="examples of an optimiser step")
    micro_batch_size: Positive | None = Field(
        None, description="examples in one pass, whose gradients add up to the batch's; null: the whole batch"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations anew in the backward pass: less memory, more time"
    )
    steps: Positive | None = Field(None, description="optimiser steps per round; excludes epochs")
    epochs: PositiveFloat | None = Field(None, description="passes over the client's examples; excludes steps")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip the client's gradient to this norm; null: never")

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("training.steps and training.epochs exclude each other; set one of them to null")
        return self


class EvaluationSection(Section):
    """How the global model is measured on the held-out split."""

    every: Positive = Field(1, description="rounds between evaluations; the first and the last are always evaluated")
    batch_size: Positive = Field(64, description="examples in one pass")
    max_examples: Positive | None = Field(None, description="evaluate a seeded sample of the test split")
    clients: Count = Field(
        100, description="clients, a seeded sample, on whose own examples the final model is scored; 0: none"
    )
    client_examples: Positive = Field(64, description="examples of each of them, at most, a seeded sample")
    targets: tuple[Fraction, ...] = Field(
        (), description="accuracies for which the bytes and the simulated seconds that they took are recorded"
    )
    tasks: tuple[TaskSection, ...] = Field((), description="questions that the model answers; causal_lm only")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluation.tasks has two tasks called {twice[0]!r}; names must differ")
        return self


class CheckpointSection(Section):
    """What is kept of a run on disk, so that it can go on after it was cut. Results do not depend on it."""

    every: Positive = Field(1, description="rounds between checkpoints; there is one after the last round")
    keep: Positive = Field(2, description="how many of the newest are kept")


class FaultSection(Section):
    """What may go wrong in a run before it ends; what was lost is done again with the same seeds."""

    infrastructure: Count = Field(10, description="lost actors, processes and nodes that are made up for")
    out_of_memory: Count = Field(2, description="likewise, where a process was killed for its memory")
    errors: Count = Field(0, description="clients whose training raised an error and that are left out")
    timeout_s: PositiveFloat | None = Field(
        None, description="real seconds after which a call to a client actor counts as hanging; null: never"
    )


class UpdateSection(Section):
    """What is taken from clients. Wrong names, shapes, types, sizes and numbers are refused in any case."""

    max_norm: PositiveFloat | None = Field(None, description="a change that is longer is refused; null: never")
    clip_norm: PositiveFloat | None = Field(None, description="a change that is longer is scaled down to this norm")
    rule: Literal["mean", "median", "trimmed_mean"] = Field("mean", description="by coordinate of the updates")
    trim: float = Field(
        0.1, ge=0, lt=0.5, description="trimmed_mean: share of the updates cut off at each end, rounded up"
    )
    noise_multiplier: PositiveFloat | None = Field(
        None, description="Gaussian noise on the sum, over clip_norm: client-level differential privacy; null: none"
    )
    delta: Fraction = Field(1e-5, description="of the (epsilon, delta) that is logged where there is noise")

    @model_validator(mode="after")
    def _clipped(self) -> Self:
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise ValueError("updates.noise_multiplier is in units of clip_norm; set updates.clip_norm, e.g. 1.0")
        if self.noise_multiplier is not None and self.rule != "mean":
            raise ValueError(f"updates.noise_multiplier goes with rule 'mean', not {self.rule!r}")
        return self


class MethodSection(NamedSection):
    """The federated method."""

    name: str = Field("fedit", description="as `fedloom methods` lists them; its options stand beside it")


class Experiment(Section):
    """A whole experiment."""

    name: str = Field(
        "experiment", min_length=1, description="begins the names of its runs; `fedloom compare` finds them by it"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="from which every draw comes")
    rounds: Positive = Field(10, description="federated rounds; the untrained model is round 0")
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    population: PopulationSection = PopulationSection()
    cohort: CohortSection = CohortSection()
    network: NetworkSection = NetworkSection()
    controller: ControllerSection = ControllerSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    method: MethodSection = MethodSection()
    checkpoint: CheckpointSection = CheckpointSection()
    faults: FaultSection = FaultSection()
    updates: UpdateSection = UpdateSection()
    save_every: Positive | None = Field(None, description="rounds between saved adapters; the last is always saved")
    chunk_size: Positive | None = Field(
        None, description="clients whose updates are folded together on an actor; by default a sixteenth of the cohort"
    )

    @model_validator(mode="after")
    def _quantized(self) -> Self:
        kind = self.model.quantization
        if kind == "none":
            return self
        for profile in self.population.profiles:
            if profile.num_gpus == 0:
                raise ValueError(
                    f"model.quantization {kind!r} needs a GPU and profile {profile.name!r} has none; give it a "
                    "share of one, e.g. num_gpus: 0.5, or set model.quantization: none and, for half the memory, "
                    "model.dtype: bfloat16"
                )
            if profile.trainer == "deepspeed":
                raise ValueError(
                    f"model.quantization {kind!r} goes with trainer plain, and profile {profile.name!r} has deepspeed, "
                    "which cuts weights up that are not quantized; set model.quantization: none, or trainer: plain"
                )
        return self

    @model_validator(mode="after")
    def _one_dtype(self) -> Self:
        """A classifier's head is trained in the model's dtype, factors in float32: ZeRO wants one of all it cuts up."""
        if self.data.task == "classification" and self.model.dtype != "float32":
            for profile in self.population.profiles:
                if stage_of(profile.deepspeed) > 0:
                    raise ValueError(
                        f"model.dtype {self.model.dtype!r} is also that of a classifier's head, and profile "
                        f"{profile.name!r} has zero_optimization.stage {stage_of(profile.deepspeed)}, which wants the "
                        "float32 of the factors; set model.dtype: float32, stage: 0, or data.task: causal_lm"
                    )
        return self

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that identify the resolved experiment."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
