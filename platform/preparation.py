"""From a validated experiment to everything that is known before a machine is asked for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedloom.platform.adapter import Template
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import ModelSpec, checkpointing, context_length, load_tokenizer
from fedloom.platform.client import Client
from fedloom.platform.data.federated import FederatedData
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.errors import ExperimentError
from fedloom.platform.evaluation import client_shards_of, shards_of
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_world import Profile, module_matches
from fedloom.platform.population import Resources, budget_of, clients_of, groups_of, resources_of
from fedloom.platform.privacy import check_updates
from fedloom.platform.record import mean_rank
from fedloom.platform.registry import build_method, method_class
from fedloom.platform.seeds import generator_for
from fedloom.platform.tasks.questions import PreparedTask, prepare_tasks
from fedloom.platform.world.memory import Footprint, check_memory, footprint_of, memory_bytes_of, with_automatic_ranks
from fedloom.platform.world.world import Costs, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything that is known before a machine is asked for.

    Attributes:
        experiment: with numbers in the place of automatic ranks.
        spec: how to build the base model.
        data: tokenised and partitioned examples.
        clients: the population, each client with its profile.
        shapes: (d_out, d_in) by target module.
        head_modules: modules that are trained in full.
        num_parameters: of the frozen base model.
        base_parameters: weights of its linear layers.
        quantizable_parameters: those of them that ``model.quantization`` is about.
        head_parameters: values of the modules that are trained in full.
        shards: the held-out examples, cut for evaluation.
        client_shards: own examples of the clients over whom the spread of the final model is measured.
        tasks: questions that the model answers beside.
    """

    experiment: Experiment
    spec: ModelSpec
    data: FederatedData
    clients: Sequence[Client]
    shapes: Mapping[str, tuple[int, int]]
    head_modules: tuple[str, ...]
    num_parameters: int
    base_parameters: int
    quantizable_parameters: int
    head_parameters: int
    shards: Sequence[np.ndarray]
    client_shards: Mapping[str, np.ndarray]
    tasks: Sequence[PreparedTask] = ()


def prepare(experiment: Experiment, data: FederatedData | None = None) -> Prepared:
    """Read the data, assign the profiles and build the architecture without weights.

    ``data``: those of an experiment with the same :func:`data_key`, which are then not read again.

    Raises:
        FedloomError: anything in the experiment that cannot work, before a machine is asked for.
    """
    if data is None:
        data = prepare_data(experiment, load_tokenizer(experiment))
    prepared = assemble(experiment, data)
    if experiment.evaluation.tasks:
        tasks = prepare_tasks(experiment, load_tokenizer(experiment), context_length(prepared.spec))
        prepared = replace(prepared, tasks=tasks)
    world_of(prepared.experiment, prepared)
    groups_of(experiment)
    if any(memory_bytes_of(profile) is not None for profile in experiment.population.profiles):
        check_memory(prepared.experiment, footprint(prepared), trained_ranks(prepared.experiment, prepared))
    return prepared


def data_key(experiment: Experiment) -> str:
    """Return what :func:`~fedloom.platform.data.prepare.prepare_data` reads of an experiment, as one text."""
    return experiment.model_dump_json(include={"seed", "model", "data", "partition"})


def trained_ranks(experiment: Experiment, prepared: Prepared) -> dict[str, float]:
    """Return the largest (mean) rank that a client of each profile trains, as the method sends it out."""
    rank = global_rank(experiment, prepared)
    method = build_method(experiment.method.name, experiment.method.options)
    template = Template(shapes=prepared.shapes, head={}, rank=rank, scale=experiment.adapter.scale)
    state = method.init(template, generator_for(experiment.seed, "plan"))
    ranks = {}
    for profile in experiment.population.profiles:
        client = Client(id="any", profile=profile.name, rank=max(profile.ranks), num_examples=1)
        budget = budget_of(profile, client.rank, prepared.shapes)
        dispatch = method.dispatch(state, client, budget, generator_for(experiment.seed, "plan"))
        ranks[profile.name] = mean_rank(dispatch, prepared.shapes)
    return ranks


def assemble(experiment: Experiment, data: FederatedData) -> Prepared:
    """Put together what is known of the population and the architecture, given the data."""
    spec = ModelSpec.of(experiment, label_names=data.label_names, pad_token_id=data.pad_token_id)
    host = AdapterHost(spec, device="meta")
    if experiment.training.gradient_checkpointing:
        with checkpointing(host.model):
            pass  # refuses an architecture that cannot
    prepared = Prepared(
        experiment=experiment,
        spec=spec,
        data=data,
        clients=(),
        shapes=host.shapes,
        head_modules=host.head_modules,
        num_parameters=host.num_parameters,
        base_parameters=host.num_linear_parameters,
        quantizable_parameters=host.num_quantizable_parameters,
        head_parameters=host.num_head_parameters,
        shards=shards_of(experiment, data),
        client_shards=client_shards_of(experiment, data),
    )
    if any(profile.rank == "auto" for profile in experiment.population.profiles):
        experiment = with_automatic_ranks(experiment, footprint(prepared))
    clients = clients_of(experiment, {name: len(indices) for name, indices in data.clients.items()})
    return replace(prepared, experiment=experiment, clients=clients)


def footprint(prepared: Prepared) -> Footprint:
    """Count the memory of one training client."""
    return footprint_of(
        prepared.experiment,
        prepared.spec,
        prepared.data,
        num_parameters=prepared.num_parameters,
        num_quantizable=prepared.quantizable_parameters,
        shapes=prepared.shapes,
        head_parameters=prepared.head_parameters,
    )


def gpu_needs(prepared: Prepared) -> dict[Resources, float]:
    """Return the bytes of a GPU that a client trains in, the largest of each pool of profiles that ask for GPUs."""
    on_gpu = [profile for profile in prepared.experiment.population.profiles if profile.num_gpus > 0]
    if not on_gpu:
        return {}
    ranks, counted = trained_ranks(prepared.experiment, prepared), footprint(prepared)
    needs: dict[Resources, float] = {}
    for profile in on_gpu:
        pool = resources_of(profile)
        needs[pool] = max(needs.get(pool, 0.0), counted.total_bytes(ranks[profile.name]))
    return needs


def global_rank(experiment: Experiment, prepared: Prepared) -> int:
    """Return the rank of the server's adapter: the experiment's, or the method's rule over the clients' ranks.

    Raises:
        ExperimentError: a rank that a layer, the method or a client's machine cannot bear.
    """
    check_updates(experiment)
    traits = method_class(experiment.method.name).traits
    if traits.needs_head and not prepared.head_modules:
        raise ExperimentError(
            f"key method.name: {experiment.method.name!r} trains a classifier's head, and data.task is "
            f"{experiment.data.task!r}. Set data.task to 'classification', or choose another method."
        )
    bounds = {
        profile.name: _rank_bounds(profile, prepared.shapes, traits.ranks_by_module)
        for profile in experiment.population.profiles
    }
    poorest, (smallest, _) = min(bounds.items(), key=lambda item: item[1][0])
    richest, (_, largest) = max(bounds.items(), key=lambda item: item[1][1])
    rank = experiment.adapter.rank or (smallest if traits.global_rank == "min" else largest)
    if traits.global_rank == "min" and rank > smallest:
        raise ExperimentError(
            f"key adapter.rank: {traits.title} trains every client at rank {rank}, but profile {poorest!r} bears only "
            f"{smallest}. Set adapter.rank to at most {smallest}, or leave it out."
        )
    if traits.global_rank == "max" and rank < largest:
        raise ExperimentError(
            f"key adapter.rank: the global rank {rank} is smaller than the rank {largest} of profile {richest!r}. "
            f"Set adapter.rank to at least {largest}, or leave it out."
        )
    module, (d_out, d_in) = min(prepared.shapes.items(), key=lambda item: min(item[1]))
    if rank > min(d_out, d_in):
        key = "adapter.rank" if experiment.adapter.rank else "population.profiles.rank"
        raise ExperimentError(
            f"key {key}: rank {rank} is larger than module {module!r} allows, which is {d_out} x {d_in}. "
            f"Set it to at most {min(d_out, d_in)}."
        )
    return rank


def _rank_bounds(profile: Profile, modules: Collection[str], by_module: bool) -> tuple[int, int]:
    """Return the smallest and the largest rank that a method trains on a profile's clients.

    Raises:
        ExperimentError: a pattern of the profile matches none of the target modules.
    """
    for key in profile.rank_pattern:
        if not any(module_matches(key, module) for module in modules):
            raise ExperimentError(
                f"key population.profiles: rank_pattern {key!r} of profile {profile.name!r} matches none of the target "
                f"modules ({', '.join(sorted({module.rpartition('.')[2] for module in modules}))}). "
                "Name modules that it matches in adapter.targets, or leave the pattern out."
            )
    budgets = [budget_of(profile, rank, modules) for rank in profile.ranks]
    most = max(budget.largest_rank if by_module else budget.rank for budget in budgets)
    return min(budget.rank for budget in budgets), most


def world_of(experiment: Experiment, prepared: Prepared) -> World:
    """Return the world before round 1."""
    costs = Costs(
        data=prepared.data,
        shapes=prepared.shapes,
        base_parameters=prepared.base_parameters,
        head_parameters=prepared.head_parameters,
        rank=global_rank(experiment, prepared),
    )
    return World(experiment, prepared.clients, costs)
